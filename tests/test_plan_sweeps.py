"""Plans of sweeps: the runs that `train -m` would make, as the rows of one plan."""

import io
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.planning import CPU_PROFILE, card
from helpers.reports import csv_rows, gpu, plan_of, row, tables, undrawn, write_varied
from rich.console import Console

from llama_ft import cli, plan
from llama_ft.config import PlanConfig, UserError
from llama_ft.config.plan import row_settings
from llama_ft.planning import predict
from llama_ft.planning.lengths import data_lengths
from llama_ft.planning.plan import make_plan
from llama_ft.records import read_record, write_record
from llama_ft.records.plan import PLAN_FILE, Plan, PlanRow
from llama_ft.reporting.comparison_report import report_comparison
from llama_ft.reporting.reports import print_plan, report_plan, write_plan

A100 = gpu("a100_40gb")


def runs_of(*arguments: str) -> list[PlanConfig]:
    return plan.planned_runs(["-m", *arguments])


def planned(*arguments: str, cards: tuple = (CPU_PROFILE, card())) -> Plan:
    runs = plan.planned_runs([*arguments, "data.first=3"])
    lengths, data, held_out = data_lengths(runs[0], lambda _: None)
    return make_plan(runs, list(cards), lengths, data, "the command", held_out=held_out)


# ------------------------------------------------------------------------------------------------------- which runs


def test_runs_are_those_that_hydra_makes_in_its_order() -> None:
    runs = runs_of("optim=mp_lora,mp", "mp.frozen_weights=compute,fp32", "gc.every=range(1,4)", "lora.rank=8")
    found = [(run.optim.combination, run.mp.frozen_weights.name, run.gc.every, run.lora.rank) for run in runs]
    assert found == list(itertools.product(("mp_lora", "mp"), ("compute", "fp32"), (1, 2, 3), (8,)))
    assert row_settings(runs)[4] == {"mp.frozen_weights": "fp32", "gc.every": 2}


@pytest.mark.parametrize("arguments", [("-m", "optim=glob(*)"), ("experiment=table2",)])
def test_sweeps_over_techniques_alone_are_combinations(arguments: tuple[str, ...]) -> None:
    runs = plan.planned_runs(list(arguments))
    assert len({run.optim.combination for run in runs}) == len(runs) == 8
    assert row_settings(runs) == [{}] * 8
    assert {run.training.micro_batch_size for run in runs} == {1 if "experiment=table2" in arguments else 8}


def test_equal_runs_are_one_row() -> None:
    assert [run.optim.combination for run in runs_of("optim=mp,lora,mp")] == ["mp", "lora"]


def test_a_list_is_one_value_among_several() -> None:
    assert [run.lora.targets for run in runs_of("optim=lora", "lora.targets=[wq],[wq,wv]")] == [["wq"], ["wq", "wv"]]


def test_what_no_run_uses_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    runs_of("optim=mp,lora", "lora.rank=4,8")
    assert capsys.readouterr().err == ""
    runs_of("optim=mp,baseline", "lora.rank=4,8")
    assert capsys.readouterr().err == "lora.rank: no effect without optim.lora=true\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        ("gpu=t4_16gb,a100_40gb",): "gpu has several values, and a plan is for one: ",
        ("model=tiny,llama2_7b",): "model has several values, and a plan is for one: ",
        ("training.seed=0,1",): "training.seed has several values, and a plan is for one: its rows can differ in",
        ("data.max_length=100,200",): "data.max_length has several values",
        ("training.lr=1,2",): "training.lr has several values",
        ("lora.rank=4,8", "goal=fit"): "goal=fit compares combinations, and a sweep lists its runs: leave one of them",
        ("lora.rank=4,8", "gc=both"): "gc=both compares combinations, and a sweep lists its runs",
        ("lora.rank=4,0",): "lora.rank=0 is not allowed: it must be at least 1",
        ("lora.rnk=4,8",): "lora.rnk is not a key",
        ("recipe=full,fool",): "recipe=fool is not allowed: it must be one of full, ",
    }.items(),
)
def test_what_is_no_row_is_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(cli.EXPECTED) as error:
        runs_of(*arguments)
    assert cli.explain(error.value, PlanConfig).startswith(words)


def test_without_m_several_values_are_refused() -> None:
    with pytest.raises(cli.EXPECTED) as error:
        plan.planned_runs(["optim=mp,lora"])
    assert "several values need -m (a sweep)" in cli.explain(error.value, PlanConfig)


# ------------------------------------------------------------------------------------------------------- the numbers

SWEEP = ("optim=mp_lora,lora", "mp.frozen_weights=compute,fp32", "training.optimizer=adamw,sgd", "lora.rank=4,8")


def test_each_row_is_that_of_a_plan_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_ft.planning.processes.MAX_PROCESSES", 1)
    made = planned("-m", *SWEEP)
    singles = itertools.product(*([f"{key}={value}" for value in values.split(",")] for key, values in (
        text.split("=") for text in SWEEP
    )))  # fmt: skip
    rows: dict[str, list[PlanRow]] = {"cpu": [], "card": []}
    for arguments in singles:
        alone = planned(*arguments)
        assert not alone.is_sweep
        for own in alone.rows:
            rows[own.gpu].append(own)
    assert [replace(each, settings={}) for each in made.rows] == [*rows["cpu"], *rows["card"]]
    assert len({row.key for row in made.rows}) == 16
    assert made.rows[1].settings == {"mp.frozen_weights": "compute", "lora.rank": 8, "training.optimizer": "adamw"}
    assert made.settings_of(made.rows[-1])["training"]["optimizer"] == "sgd"


def test_runs_share_fake_steps_exactly_where_a_micro_batch_is_the_same() -> None:
    def n_keys(*arguments: str) -> int:
        return len({predict._key(run, card()) for run in runs_of(*arguments)})

    assert n_keys("optim=ga_lora,lora", "ga.steps=2,4") == 1
    assert n_keys("optim=ga_lora,lora", "ga.steps=2,4", "training.packing=64") == 3
    assert n_keys("optim=lora", "gc.every=1,2") == 1  # GC is off
    assert n_keys("optim=lora", "optim.gc=true", "gc.every=1,2") == 2
    assert n_keys("optim=lora", "training.optimizer=adamw,sgd", "lora.rank=4,8") == 4


# ---------------------------------------------------------------------------------------------------- how it is shown


def sweep_plan() -> Plan:
    """24 rows: 1,000 MiB and one more for each."""
    rows = []
    for number, (name, frozen, optimizer, size) in enumerate(
        itertools.product(("mp_lora", "ga_mp_lora"), ("compute", "nf4"), ("adamw", "sgd", "adamw_8bit"), (1, 4))
    ):
        own = {"mp.frozen_weights": frozen, "training.optimizer": optimizer, "training.micro_batch_size": size}
        rows.append(replace(row(name, A100, 1000.0 + number), settings=own))
    return plan_of(rows, A100)


def test_a_row_for_each_run(tmp_path: Path) -> None:
    write_plan(sweep_plan(), tmp_path)
    (table,) = [line.split(" | ") for line in (tmp_path / "plan.md").read_text().splitlines() if " peak MiB " in line]
    assert table[:4] == ["| techniques", "mp.frozen_weights", "training.optimizer", "training.micro_batch_size"]
    out = io.StringIO()
    print_plan(sweep_plan(), Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("techniques"))
    assert lines[start].split()[:4] == ["techniques", "frozen_weights", "optimizer", "micro_batch_size"]
    assert [line.split()[4] for line in lines[start + 2 : start + 26]] == [f"{1000 + n:,}" for n in range(24)]
    assert "MP with LoRA" not in out.getvalue()  # it is a column
    assert [line["training.optimizer"] for line in csv_rows(tmp_path / "plan.csv")[:5:2]] == [
        "adamw",
        "sgd",
        "adamw_8bit",
    ]
    page = (tmp_path / "plan.html").read_text()
    assert "Tensors at the peak: MP+LoRA, frozen_weights=nf4, optimizer=sgd, micro_batch_size=4" in page


def test_a_plan_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    old = plan_of([row("baseline", A100), row("lora", A100)], A100)
    content = asdict(old)
    for each in content["rows"]:
        del each["settings"]
    (tmp_path / PLAN_FILE).write_text(json.dumps(content))
    assert read_record(Plan, tmp_path / PLAN_FILE) == old
    with undrawn():
        report_plan(tmp_path, Console(file=io.StringIO()))
    (table,) = tables((tmp_path / "plan.md").read_text())
    assert table["LoRA"] == ["OFF", "ON"]


def test_two_rows_of_the_same_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rows must be one for each run"):
        plan_of([row("lora", A100), row("lora", A100)], A100)
    twice = [replace(row("lora", A100), settings={"lora.rank": rank}) for rank in (4, 8)]
    assert plan_of(twice, A100).is_sweep


def test_measured_runs_are_matched_to_rows_by_their_settings(tmp_path: Path) -> None:
    """Two ranks, of which the plan has one, and another; 1 % and 25 % apart."""
    sweep, folder, cpu = tmp_path / "sweep", tmp_path / "plan", gpu("cpu", None, "cpu")
    for rank, peak in ((4, 100.0), (8, 200.0), (16, 400.0)):
        config = {"lora": {"rank": rank}, "training": {"lr": 0.1, "micro_batch_size": 1}}
        write_varied(sweep, f"lora,lora.rank={rank}", config, peak_memory_mib=peak)
    rows = [
        replace(row("lora", cpu, peak), settings={"lora.rank": r}) for r, peak in ((16, 404.0), (2, 1.0), (8, 250.0))
    ]
    folder.mkdir()
    write_record(plan_of(rows, cpu), folder / PLAN_FILE)
    with undrawn():
        report_comparison(sweep, folder, Console(file=io.StringIO()))
    lines = {line["variant"]: line for line in csv_rows(folder / "comparison.csv")}
    errors = {name: float(line["peak_memory_mib.error"]) for name, line in lines.items()}
    assert errors == {"rank=16": pytest.approx(0.01), "rank=8": pytest.approx(0.25)}
    text = (folder / "comparison.md").read_text()
    assert "Only predicted: rank=2." in text
    assert "lora.rank=4: no row of the plan has its techniques and settings" in text
    assert "worst +25.0% (rank=8)" in text
    assert "lora.rank:" not in text  # no difference


def test_a_plan_that_predicts_no_run_by_its_settings_says_so(tmp_path: Path) -> None:
    sweep, folder, cpu = tmp_path / "sweep", tmp_path / "plan", gpu("cpu", None, "cpu")
    write_varied(sweep, "lora,lora.rank=4", {"lora": {"rank": 4}})
    folder.mkdir()
    write_record(plan_of([replace(row("lora", cpu), settings={"lora.rank": 2})], cpu), folder / PLAN_FILE)
    with pytest.raises(UserError, match=r"predicts no run of .* no row of the plan has its techniques and settings"):
        report_comparison(sweep, folder, Console(file=io.StringIO()))
