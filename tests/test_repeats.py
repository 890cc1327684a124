"""Repeats under several seeds: their statistics, the order in which they run, and how reports show them."""

import json
import math
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import injected, run
from helpers.reports import EIGHT, Page, csv_rows, optim, plan_of, report, row, tables, undrawn, write, write_steps
from helpers.reports import gpu as card
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from llama_ft.files import write_json
from llama_ft.records import write_record
from llama_ft.records.result import Result
from llama_ft.reporting import figure
from llama_ft.reporting.reading import read_groups
from llama_ft.reporting.repeats import Repeated, are_apart, half_width, repeated, t_probability, t_quantile
from llama_ft.reporting.repeats import Run as OneRun
from llama_ft.reporting.table2 import cell

SECONDS = (10.0, 11.0, 12.0)
# Of 10, 11 and 12: a standard deviation of 1, of the mean one of 1 / sqrt(3), and t(0.975, 2) = 4.303.
HALF = 4.303 / math.sqrt(3)

# --------------------------------------------------------------------------------------------------------- statistics

# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, upper 0.975.
PUBLISHED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 19: 2.093, 30: 2.042, 100: 1.984}


@pytest.mark.parametrize("freedom", PUBLISHED)
def test_quantiles_are_the_published_ones(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(PUBLISHED[freedom], abs=5.1e-4)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 6.0, 15.0])
def test_probabilities_are_closed_forms_and_the_integral_of_the_density(t: float) -> None:
    """Those of one and two degrees of freedom, and for a number of them that is not whole PyTorch's density."""
    assert t_probability(t, 1) == pytest.approx(2 / math.pi * math.atan(t), abs=1e-8)
    assert t_probability(t, 2) == pytest.approx(t / math.sqrt(2 + t * t), abs=1e-8)
    for freedom in (1.3, 2.7, 24.9):
        grid = torch.linspace(-t, t, 100_001, dtype=torch.float64)
        density = torch.distributions.StudentT(torch.tensor(freedom, dtype=torch.float64)).log_prob(grid).exp()
        assert t_probability(t, freedom) == pytest.approx(float(torch.trapezoid(density, grid)), abs=1e-7)


def test_an_interval_holds_the_mean_and_equal_means_are_apart_as_often_as_95_percent_says() -> None:
    """Of unequal variances and numbers of runs, for which Welch's test is made."""
    draw, trials = random.Random(0), 4_000
    held = apart = 0
    for _ in range(trials):
        a, b = ([draw.gauss(5.0, sigma) for _ in range(n)] for sigma, n in ((1.0, 4), (3.0, 6)))
        held += abs(fmean(a) - 5.0) <= half_width(a)
        apart += bool(are_apart(a, b))
    assert held / trials == pytest.approx(0.95, abs=0.01)
    assert apart / trials == pytest.approx(0.05, abs=0.012)


def test_without_spread_any_difference_is_larger_and_one_run_says_nothing() -> None:
    assert are_apart([2.0, 2.0], [2.0, 2.0]) is False
    assert are_apart([2.0, 2.0], [2.0001, 2.0001]) is True
    assert are_apart([2.0], [3.0, 3.0]) is None
    assert are_apart([2.0, math.nan], [3.0, 3.0]) is None


# --------------------------------------------------------------------------------------------------- one row of a table


def write_seeds(
    folder: Path, combination: str, values: dict[str, Any], seeds: Any = (0, 1, 2), **settings: Any
) -> None:
    """A run for each seed; of a tuple of values each run has its own."""
    for number, seed in enumerate(seeds):
        own = {key: value[number] if isinstance(value, tuple) else value for key, value in values.items()}
        if loss := own.get("eval_loss"):
            own |= {"eval_loss_before": loss, "best_eval_loss": loss, "last_eval_loss": loss}
            own |= {"best_eval_step": 3, "last_eval_step": 3, "eval_perplexity": math.exp(loss)}
        status, named = own.pop("status", "ok"), "".join(f",training.{key}={value}" for key, value in settings.items())
        name = f"{combination}{named},training.seed={seed}"
        write(folder, name, status, settings_hash=f"{settings} {seed}", **own)
        training = {"seed": seed, "epochs": 1, **settings}
        config = {"optim": optim(combination), "training": training, "sweep": {"order": f"{seed}"}}
        OmegaConf.save(OmegaConf.create(config), folder / name / "config.yaml")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "a"
    learned = {"eval_loss": (1.0, 1.1, 1.2), "eval_token_accuracy": (0.5, 0.51, 0.52), "eval_samples": 40}
    write_seeds(folder, "baseline", {"peak_memory_mib": 200.0, "runtime_s": SECONDS, **learned})
    write_seeds(folder, "lora", {"peak_memory_mib": (48.0, 50.0, 52.0), "runtime_s": 5.5, **learned})
    return folder


def table_of(folder: Path) -> tuple[dict[str, list[str]], str]:
    with undrawn():
        assert report(folder).stderr == ""
    text = (folder / "table2.md").read_text()
    (table,) = tables(text)
    return table, text


def test_a_combination_under_several_seeds_is_one_column_of_means_with_their_spread(sweep: Path) -> None:
    table, text = table_of(sweep)
    assert table["LoRA"] == ["OFF", "ON"]
    assert table["Runtime, s"] == [f"11.0 ± {HALF:.1f}", "5.50"] == ["11.0 ± 2.5", "5.50"]
    assert table["Peak memory, MiB"] == ["200", "50.0 ± 5.0"]  # equal ones have no spread
    assert table["of baseline"] == ["100%", "25%"]
    assert table["of baseline (2)"] == ["100%", "50%"]
    assert table["Held-out loss"] == ["1.100 ± 0.248"] * 2
    assert table["Token accuracy"] == ["51.0% ± 2.5%"] * 2
    assert "Runs" not in table
    assert "3 seeds: 0, 1, 2" in text.splitlines()[0]
    assert "95 % confidence interval" in text
    assert "Held-out loss: of 40 samples (data.validation)" in text


def test_without_held_out_records_nothing_is_said_of_them(tmp_path: Path) -> None:
    write_seeds(tmp_path, "lora", {})
    table, text = table_of(tmp_path)
    assert not {"Held-out loss", "Token accuracy"} & table.keys()
    assert "eld-out" not in text


def test_the_csv_has_a_line_for_each_run_unrounded(sweep: Path) -> None:
    table_of(sweep)
    rows = csv_rows(sweep / "table2.csv")
    assert [(line["combination"], line["training.seed"], line["runtime_s"]) for line in rows] == [
        *(("baseline", str(seed), str(seconds)) for seed, seconds in enumerate(SECONDS)),
        *(("lora", str(seed), "5.5") for seed in range(3)),
    ]


def test_repeats_that_did_not_finish_are_said_at_their_row(sweep: Path) -> None:
    write_seeds(sweep, "mp", {"status": ("ok", "oom", "ok"), "runtime_s": 8.0})
    write_seeds(sweep, "ga", {"status": ("killed", "oom", "oom")})
    write_seeds(sweep, "ga_lora", {"runtime_s": SECONDS}, seeds=(1,))
    # Refused before it began: it left no settings but its name.
    write(sweep, "ga_lora,training.seed=-1", "error", config_hash=None)
    table, text = table_of(sweep)
    assert table["Runs"] == ["3", "3", "2, 1 ×", "1 killed, 2 ×", "1, 1 error"]
    assert table["Runtime, s"] == ["11.0 ± 2.5", "5.50", "8.00", "×", "10.0"]
    assert "- ga (seed 0): why ga is killed" in text
    assert "- ga_lora (seed -1): why ga_lora is error" in text
    assert "4 seeds: -1, 0, 1, 2" in text


def test_a_row_of_which_all_seeds_ran_out_of_memory_is_a_cross(sweep: Path) -> None:
    write_seeds(sweep, "mp", {"status": "oom"})
    table, _ = table_of(sweep)
    assert table["Peak memory, MiB"] == ["200", "50.0 ± 5.0", "×"]
    assert "Runs" not in table


def test_seeds_beside_other_settings_are_a_row_for_each_setting(tmp_path: Path) -> None:
    learned = {"eval_loss": (1.0, 1.1, 1.2), "eval_token_accuracy": (0.5, 0.51, 0.52), "eval_samples": 40}
    write_seeds(tmp_path, "lora", {"runtime_s": SECONDS, **learned}, lr=3e-4)
    write_seeds(tmp_path, "lora", {"eval_loss": 1.3, "eval_token_accuracy": 0.4, "eval_samples": 40}, (1, 2), lr=1e-4)
    table, text = table_of(tmp_path)
    assert "| training.lr | peak MiB | runtime s |" in text
    assert table["0.0001"] == ["100", r"\*10.0", "7.250", "6.125", "1.300", "40.0%", "2"]
    assert table["0.0003"] == ["100", "11.0 ± 2.5", "7.250", "6.125", r"\*1.100 ± 0.248", r"\*51.0% ± 2.5%", "3"]
    assert "for accuracy the highest" in text
    lines = [(line["training.lr"], line["training.seed"]) for line in csv_rows(tmp_path / "table2.csv")]
    assert lines == [("0.0001", "1"), ("0.0001", "2"), *(("0.0003", str(seed)) for seed in range(3))]


def test_runs_that_differ_in_more_than_the_seed_stay_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_seeds(tmp_path, "lora", {}, (seed,), lr=1e-4 * (seed + 1))
    (group, *others) = read_groups(tmp_path)
    assert len(others) == 1
    assert not any(isinstance(result, Repeated) for result in group.results)
    for name in ("copied", "again"):  # the same seed twice: which of them counts, nobody knows
        write_seeds(tmp_path / name, "lora", {}, (0,))
    write_seeds(tmp_path / "copied", "lora", {}, (1,))
    (tmp_path / "again" / "lora,training.seed=0").rename(tmp_path / "copied" / "lora,training.seed=00")
    assert not any(group.seeds for group in read_groups(tmp_path / "copied"))


def test_a_spread_has_the_decimals_of_its_mean() -> None:
    def shown(values: tuple[float, ...], form: Any) -> str:
        results = [Result("lora", *["x"] * 3, {}, {}, 1, "", "ok", runtime_s=value) for value in values]
        return cell(repeated([OneRun(result, Path(), n) for n, result in enumerate(results)]), "runtime_s", form)

    assert shown((1000.0, 1010.0, 1020.0), "{:,.0f}".format) == "1,010 ± 25"
    assert shown((1000.0, 1000.1, 1000.2), "{:,.0f}".format) == "1,000"
    assert shown((1e-5, 2e-5, 3e-5), "{:.3g}".format) == "2e-05 ± 2.48e-05"
    assert shown((1.0, math.nan), "{:.3f}".format) == "nan"


def test_eight_combinations_with_spread_fit_into_120_columns(tmp_path: Path) -> None:
    for name in EIGHT:
        values = {"peak_memory_mib": (91_000.0, 92_000.0), "runtime_s": (123.0, 124.0), "eval_loss": (1.51, 1.52)}
        values |= {"peak_rss_mib": 100.0, "tokens_per_s": (14_000.0, 14_050.0)}
        write_seeds(tmp_path, name, values, (0, 1))
    with undrawn():
        wide, narrow = (report(tmp_path, columns=columns).stdout.splitlines() for columns in (120, 80))
    (losses,) = [line.split()[2:] for line in wide if line.startswith("Held-out loss")]
    assert losses == ["1.515±0.064"] * 8
    assert [len(line.split()[2:]) for line in narrow if line.startswith("Held-out loss")] == [4, 4]
    assert max(len(line.rstrip()) for line in wide if line.startswith(("GA", "Peak", "Held-out"))) <= 120


# ---------------------------------------------------------------------------------------------------- pictures and page


def test_pictures_have_an_error_bar_and_a_dot_for_each_run_where_repeats_differ(sweep: Path) -> None:
    (group,) = read_groups(sweep)
    for panel, row_number, mean, half, values in (
        (figure.runtime_panel(group), 0, 11.0, HALF, SECONDS),
        (figure.group_panels(group)[0], 1, 50.0, 2 * HALF, (48.0, 50.0, 52.0)),
    ):
        axes = Figure().subplots()
        panel(axes)
        (errors,) = [each for each in axes.containers if each.get_label() == figure.SPREAD]
        (segment,) = errors.lines[2][0].get_segments()
        assert [x for x, _ in segment] == pytest.approx([mean - half, mean + half], rel=1e-3)
        assert {y for _, y in segment} == {row_number}
        (dots,) = [line for line in axes.lines if line.get_label() == figure.EACH_RUN]
        assert list(dots.get_xdata()) == list(values)


def test_the_report_is_drawn_and_its_page_has_every_run(sweep: Path) -> None:
    for folder in sweep.iterdir():
        write_steps(folder, 3)
    assert report(sweep).returncode == 0
    with Image.open(sweep / "table2.png") as image:
        image.verify()
    page = Page((sweep / "report.html").read_text())
    assert "6 runs: 6 ok" in page.text
    assert ["Runtime, s", "11.0 ± 2.5", "5.50"] in page.rows
    for seed in range(3):
        assert f"LoRA (seed {seed})" in page.text
    assert len(page.pictures("loss: ")) == 1  # all six have the same curve, so the same text
    assert (sweep / "report.html").read_text().count('alt="loss: ') == 6
    for alt in ("runtime", "peak memory by category"):
        (svg,) = page.pictures(alt).values()
        assert "LineCollection" in svg


# --------------------------------------------------------------------------------------------------------- comparisons


def compared(first: Path, second: Path) -> tuple[dict[str, list[str]], str, str]:
    with undrawn():
        done = report(first, second)
    assert (done.returncode, done.stderr) == (0, "")
    text, page = (second / f"comparison.{kind}" for kind in ("md", "html"))
    return tables(text.read_text())[0], text.read_text(), page.read_text()


def test_a_comparison_says_which_differences_are_larger_than_the_spread(sweep: Path, tmp_path: Path) -> None:
    other, learned = tmp_path / "b", {"eval_loss": (1.05, 1.15, 1.25), "eval_token_accuracy": (0.6, 0.61, 0.62)}
    write_seeds(other, "baseline", {"peak_memory_mib": 190.0, "runtime_s": (10.0, 12.0, 14.0), **learned}, (3, 4, 5))
    write_seeds(other, "lora", {"peak_memory_mib": 40.0, "runtime_s": 5.0}, (3,))
    rows, text, page = compared(sweep, other)
    assert rows["Runtime, s A"] == ["11.0 ± 2.5", "5.50"]
    assert rows["Runtime, s B"] == ["12.0 ± 5.0", "5.00"]
    # A run by itself says nothing of its spread, and nothing is claimed.
    assert rows["Runtime, s difference"] == ["+9.1% ~", "-9.1%"]
    assert rows["Peak memory, MiB difference"] == ["-5.0%", "-20.0%"]
    assert rows["Held-out loss difference"] == ["+0.050 ~", "changed"]
    assert rows["Token accuracy difference"] == ["+10.0%", "changed"]
    assert "Runs A" not in rows  # all its rows have as many
    assert rows["Runs B"] == ["3", "1"]
    assert "training.seed: 0, 1, 2 in A, 3, 4, 5 in B" in text
    assert "Welch" in text
    for cell_text, colored in (("+9.1% ~", False), ("-5.0%", True), ("-9.1%", True), ("+10.0%", True)):
        assert (f'<td class="better">{cell_text}' in page) == colored
    assert "worse" not in page.split("</style>")[1].replace("orange: worse", "")
    first, second = csv_rows(other / "comparison.csv")
    assert (first["runs.A"], second["runs.B"]) == ("3", "1")
    assert float(first["runtime_s.half_width.A"]) == pytest.approx(HALF, rel=1e-3)
    assert float(first["runtime_s.difference"]) == pytest.approx(1 / 11)
    assert second["runtime_s.half_width.B"] == ""


def test_a_sweep_without_repeats_compares_with_one_that_has_them(sweep: Path, tmp_path: Path) -> None:
    write(tmp_path / "b", "lora", runtime_s=11.0)
    rows, text, _ = compared(sweep, tmp_path / "b")
    assert rows["Runtime, s difference"] == ["+100.0%"]
    assert "~" not in "".join(rows["Runtime, s difference"])
    assert "Welch" not in text


def test_curves_of_all_repeats_are_in_the_picture_of_a_comparison(sweep: Path, tmp_path: Path) -> None:
    write_seeds(tmp_path / "b", "lora", {}, (0, 1))
    for folder in [*sweep.iterdir(), *(tmp_path / "b").iterdir()]:
        write_steps(folder, 4)
    assert report(sweep, tmp_path / "b").returncode == 0
    (svg,) = Page((tmp_path / "b" / "comparison.html").read_text()).pictures("LoRA: loss").values()
    drawn = {color: svg.count(f"fill: none; stroke: {color.lower()}") for color in figure.SIDE_COLORS}
    assert list(drawn.values()) == [3, 2]


def test_a_plan_is_compared_with_means(sweep: Path, tmp_path: Path) -> None:
    cpu = card("cpu", None, "cpu")
    plan = plan_of([row("baseline", cpu, 210.0, None), row("lora", cpu, 50.0, None)], cpu)
    (tmp_path / "plan").mkdir()
    write_record(plan, tmp_path / "plan" / "plan.json")
    write_json(tmp_path / "plan" / "x.json", {})
    rows, text, _ = compared(sweep, tmp_path / "plan")
    assert rows["Peak memory, MiB measured"] == ["200", "50.0 ± 5.0"]
    assert rows["Peak memory, MiB error"] == ["+5.0%", "="]
    assert "Seeds of the measured runs: 0, 1, 2." in text
    assert "Welch" not in text


# --------------------------------------------------------------------------------------------------------------- order


@pytest.fixture
def no_training(tmp_path: Path) -> dict[str, str]:
    """Environment in which every run's process ends at once: a sweep of failures, but with all its folders."""
    return injected(tmp_path / "inject", into="llama_ft.launch.child", code="import os; os._exit(7)")


def in_order(tmp_path: Path, env: dict[str, str], *arguments: str) -> tuple[list[tuple[str, str]], str]:
    """Combination and seed of the runs, in the order in which they came to be; what was printed."""
    fast = ("training.max_samples=4", "tracker=disabled", "hydra.sweep.dir=sweep")
    done = run("llama_ft.train", *arguments, *fast, cwd=tmp_path, env=env)
    files = sorted(tmp_path.glob("sweep/*/result.json"), key=lambda file: file.stat().st_mtime_ns)
    names = [(json.loads(file.read_text())["combination"], file.parent.name.partition("seed=")[2]) for file in files]
    return names, done.stdout + done.stderr


FORMS = {
    "experiment": (("experiment=table2", "training.seed=0,1"), EIGHT, "01"),
    "typed after": (("-m", "optim=mp,lora", "training.seed=choice(1,0)"), ["mp", "lora"], "10"),
    "typed before": (("-m", "training.seed=range(0,2)", "optim=glob(ga_lora*)"), ["ga_lora"], "01"),
    "alone": (("-m", "training.seed=2,1", "optim=lora"), ["lora"], "21"),
}


@pytest.mark.process
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["grouped", "alternate"])
def test_repeats_run_together_or_in_turns_wherever_the_seeds_stand(
    tmp_path: Path, no_training: dict[str, str], form: str, order: str
) -> None:
    arguments, names, seeds = FORMS[form]
    given = (f"sweep.order={order}",) if order == "alternate" else ()  # the other is the default
    ran, printed = in_order(tmp_path, no_training, *arguments, *given)
    grouped = [(name, seed) for name in names for seed in seeds]
    assert ran == (grouped if order == "grouped" else sorted(grouped, key=lambda each: seeds.index(each[1])))
    assert "no effect" not in printed
    assert "Callback" not in printed


@pytest.mark.process
def test_an_order_without_repeats_is_said_to_have_no_effect_and_the_seed_is_no_part_of_the_names(
    tmp_path: Path, no_training: dict[str, str]
) -> None:
    arguments = ("-m", "optim=mp,lora", "training.seed=3", "sweep.order=alternate")
    ran, printed = in_order(tmp_path, no_training, *arguments)
    assert ran == [("mp", ""), ("lora", "")]
    assert printed.count("sweep.order: no effect without repeats, such as training.seed=0,1,2") == 1


@pytest.mark.process
def test_real_repeats_are_one_row(tmp_path: Path) -> None:
    arguments = ("-m", "optim=baseline,lora", "training.seed=0,1,2", "training.micro_batch_size=1")
    options = ("training.max_samples=4", "tracker=disabled", "hydra.sweep.dir=sweep")
    done = run("llama_ft.train", *arguments, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tables((tmp_path / "sweep" / "table2.md").read_text())
    results = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("sweep/lora,*/result.json"))]
    losses = [result["train_loss_after"] for result in results]
    assert table["Loss after"][1] == f"{fmean(losses):.3f} ± {half_width(losses):.3f}"
    assert "3 seeds: 0, 1, 2" in done.stdout
    assert len(csv_rows(tmp_path / "sweep" / "table2.csv")) == 6
