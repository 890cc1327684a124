"""`report.html`, and the comparison of two sweeps, on results made by hand."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.reports import (
    CATEGORIES,
    EIGHT,
    EVIL,
    TECHNIQUES,
    Page,
    csv_rows,
    optim,
    paths,
    report,
    step,
    tables,
    undrawn,
    write,
    write_steps,
)
from PIL import Image

from llama_ft.records.metrics import read_metrics
from llama_ft.records.result import MemoryItem
from llama_ft.reporting.comparison import SAME_SETTINGS
from llama_ft.reporting.comparison_report import FILES
from llama_ft.reporting.page import MAX_POINTS

COMMAND = "python -m llama_ft.train experiment=table2 training.lr=1e-4"
VERSIONS = {"llama_ft": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "cuda": None}
CONFIG = """\
optim: {ga: false, mp: false, lora: true, gc: false}
lora: {rank: 16, targets: [wq, wv]}
training: {lr: 0.0001, seed: 0, save_every: null}
data: {name: sample, path: null, cache_dir: ~/.cache/llama_ft}
gpu: {name: auto, memory_mib: null}
tracker: {mode: auto, project: llama_ft}
measure: {memory_limit_mib: null}
"""


def section(page: str, label: str) -> str:
    """The part of a page that is about one run."""
    end = r"\n+(?=<details><summary><b>|</main>|<h)"
    (part,) = re.findall(rf"<details><summary><b>{re.escape(label)}</b>.*?</details>{end}", page, re.DOTALL)
    return part


def curves(part: str) -> dict[str, list[list[tuple[float, float]]]]:
    """The lines of the pictures in a part of a page, by what is read aloud of them."""
    return {words: paths(svg) for words, svg in Page(part).pictures().items() if " at step " in words}


# ----------------------------------------------------------------------------------------------- the page of a sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every ending, one with the worst that a user can write into it."""
    folder = tmp_path_factory.mktemp("page") / "sweep"
    facts = {"command": COMMAND, "versions": VERSIONS, "peak_phase": "backward", "compute_dtype": "float32"}
    breakdown = [MemoryItem("other", "int64", 0.001, "batches"), MemoryItem("parameter", "float32", 81.25)]
    write(folder, "baseline", peak_memory_mib=203.0, runtime_s=51.0, breakdown=breakdown, **facts)
    write(folder, "lora", peak_memory_mib=48.2, runtime_s=25.5, **facts)
    write(folder, "mp", "error", error=f"the loss of optimizer step 3 is nan {EVIL}", command=f"train {EVIL} \udcff")
    write(folder, "mp_lora", "interrupted")
    write(folder, "ga", "killed")
    write(folder, "ga_lora", "oom", memory_limit_mib=300)
    write(folder, f"baseline,model={EVIL.replace('/', '_')}", model=EVIL, device="\x00\x1b[1m")
    write_steps(folder / "baseline", 24)
    write_steps(folder / "lora", 24, more='{"step": 25, "total_st')
    # The last step of a run that its loss has stopped.
    write_steps(folder / "mp", 2, more=step(3, loss=math.nan, grad_norm=None))
    write_steps(folder / "mp_lora", 1)
    (folder / "lora" / "config.yaml").write_text(CONFIG + f"tokenizer: {EVIL}\n")
    assert report(folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def text(sweep: Path) -> str:
    return (sweep / "report.html").read_text(encoding="utf-8")


def test_page_needs_nothing_else_and_escapes_what_users_can_write(text: str) -> None:
    page = Page(text)  # which looks for scripts, sources and control characters
    assert text.startswith("<!doctype html>")
    assert {"lang": "en"} in page.named("html")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert page.text.count("<script>alert('&\"')") >= 4  # a model's name, an error, a command, a config


def test_page_is_the_same_each_time_and_small(sweep: Path, text: str) -> None:
    assert report(sweep).returncode == 0
    assert (sweep / "report.html").read_text(encoding="utf-8") == text
    assert len(text) < 250_000


def test_page_holds_every_cell_of_table2(sweep: Path, text: str) -> None:
    rows = [tuple(row) for row in Page(text).rows]
    for table in tables((sweep / "table2.md").read_text(encoding="utf-8")):
        del table["---"]
        for name, cells in table.items():
            assert (name.removesuffix(" (2)"), *cells) in rows
    assert ("Peak memory, MiB", "203", "48.2", "error", "stopped", "killed", "×") in rows


def test_page_begins_with_table_and_picture_and_counts_the_endings(text: str) -> None:
    parts = ("<h1>", "7 runs: 3 ok", "<h2>", "Peak memory, MiB", "<img", "<h3>Memory", "<h3>Runs")
    order = [text.index(part) for part in parts]
    assert order == sorted(order)
    assert "3 ok, 1 out of memory, 1 killed, 1 interrupted, 1 failed" in Page(text).text


def test_page_holds_memory_by_category_and_the_tensors_at_the_peak(text: str) -> None:
    rows = Page(text).rows
    assert [
        "",
        *(category.replace("_", " ") for category in CATEGORIES if category != "gathered"),
        "sum",
        "during",
    ] in rows
    assert ["LoRA", "19.3", "9.64", "9.64", "7.23", "2.41", "48.2", "backward"] in rows  # 40, 20, 20, 15 and 5 %
    assert ["GA+LoRA", *["–"] * 5, "×", "–"] in rows
    assert rows.index(["parameter", "float32", "81.2"]) < rows.index(["other (batches)", "int64", "<0.01"])


def test_page_has_a_section_for_each_run(text: str) -> None:
    ending = "ok: peak 48.2 MiB, 25.5 s, 1,400 tokens/s, loss 7.250 before, 6.125 after"
    facts = (COMMAND, "torch 2.13.0", "1,000 of 4,000 (25 %)", "200 samples, 14,000 tokens", "hash of lora", "rank: 16")
    for label, words in {
        "LoRA": (ending, *facts),
        "MP": ("error: the loss of optimizer step 3 is nan", "sweep/mp"),
        "MP+LoRA": ("interrupted: why mp_lora is interrupted",),
        "GA": ("killed: why ga is killed", "No optimizer step was finished."),
        "GA+LoRA": ("oom: why ga_lora is oom",),
    }.items():
        shown = Page(section(text, label)).text
        assert [word for word in words if word not in shown] == []
        assert "cuda" not in shown  # null: there is none


def test_a_curve_has_a_point_for_each_step(text: str) -> None:
    drawn = curves(section(text, "LoRA"))
    assert next(iter(drawn)) == "loss: 6.9 at step 1, 4.6 at step 24"
    assert [words.partition(":")[0] for words in drawn] == [
        *("loss", "learning rate", "gradient norm", "tokens/s", "memory in use, MiB")
    ]
    points = [line for (line,) in drawn.values()]
    assert [len(line) for line in points] == [24] * 5  # the 25th line was cut short
    loss, lr, *_, memory = points
    down = [b - a for (_, a), (_, b) in itertools.pairwise(loss)]
    assert all(space == pytest.approx(down[0], abs=0.15) and space > 0 for space in down)  # down the page is less
    assert lr[0][1] < lr[-1][1]
    assert len({y for _, y in memory}) == 1


def test_steps_without_a_finite_value_have_no_point_and_a_single_step_is_a_dot(text: str) -> None:
    lengths = [len(line) for (line,) in curves(section(text, "MP")).values()]
    assert lengths == [2, 3, 2, 3, 3]  # loss and gradient norm
    single = Page(section(text, "MP+LoRA")).pictures("loss: ")
    assert all(svg.count("<use ") > 3 for svg in single.values())  # a marker beside the axes' ticks


def test_many_steps_are_thinned_and_no_spike_is_lost(tmp_path: Path) -> None:
    write(tmp_path, "baseline")
    spiky = "".join(step(n, loss=9.0 if n == 777 else 1.0) for n in range(1, 2_001))
    (tmp_path / "baseline" / "metrics.jsonl").write_text(spiky)
    assert report(tmp_path).returncode == 0
    part = section((tmp_path / "report.html").read_text(encoding="utf-8"), "baseline")
    assert len(part) < 70_000
    assert [len(line) for (line,) in curves(part).values()] == [MAX_POINTS] * 5
    (svg,) = Page(part).pictures("loss").values()
    (line,) = paths(svg)
    (band,) = re.findall(r'FillBetween.*? d="([^"]*)"', svg, re.DOTALL)
    heights = [float(y) for _, y in re.findall(r"([\d.]+) -([\d.]+)", band)]
    assert max(heights) - min(heights) > 55  # nearly the whole height of the axes
    spike = min(line, key=lambda point: point[1])
    assert (spike[0] - line[0][0]) / (line[-1][0] - line[0][0]) == pytest.approx(777 / 2_000, abs=0.01)


@pytest.mark.parametrize(
    "line", ["{", '{"loss": 1}', "[" * 10**5, step(1).replace("1", "1" * 30, 1)], ids=lambda line: line[:30]
)
def test_a_damaged_step_is_named_and_nothing_is_written(tmp_path: Path, line: str) -> None:
    write(tmp_path, "baseline")
    write_steps(tmp_path / "baseline", 2, more=f"{line}\n{step(4)}")
    done = report(tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path / 'baseline' / 'metrics.jsonl'}, line 3" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["baseline"]


def test_metrics_of_a_run_that_never_began_are_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 7')
    assert read_metrics(tmp_path) == []


# --------------------------------------------------------------------------------------------------- the comparison


def write_pair(tmp_path: Path, name: str = "lora", a: Any = None, b: Any = None) -> None:
    """The same run in the sweeps a and b but for the values given."""
    for side, values in (("a", a or {}), ("b", b or {})):
        write(tmp_path / side, name, **values)
        (tmp_path / side / name / "config.yaml").write_text(CONFIG)


def compare(tmp_path: Path) -> tuple[dict[str, list[str]], str]:
    """The rows of comparison.md, such as `Runtime, s A`, and all of it; its pictures are left out."""
    with undrawn():
        done = report(tmp_path / "a", tmp_path / "b")
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "b" / "comparison.md").read_text(encoding="utf-8")
    return tables(text)[0], text


def page_of(tmp_path: Path) -> Page:
    return Page((tmp_path / "b" / "comparison.html").read_text(encoding="utf-8"))


def marks(tmp_path: Path) -> list[tuple[str, str]]:
    """The cells of the comparison's page that are colored, and how."""
    html = (tmp_path / "b" / "comparison.html").read_text(encoding="utf-8")
    return re.findall(r'<td class="(better|worse|changed)">([^<]*)<', html)


def test_equal_sweeps_are_equal_everywhere(tmp_path: Path) -> None:
    for name in EIGHT:
        write_pair(tmp_path, name)
    rows, text = compare(tmp_path)
    differences = [cell for name, cells in rows.items() if name.endswith(" difference") for cell in cells]
    assert differences == ["="] * 8 * 4
    assert SAME_SETTINGS == "Settings, device and versions are the same."
    assert SAME_SETTINGS in text
    assert SAME_SETTINGS in page_of(tmp_path).text
    assert marks(tmp_path) == []


def test_changes_are_given_in_percent_and_marked(tmp_path: Path) -> None:
    a = {"peak_memory_mib": 200.0, "runtime_s": 10.0, "tokens_per_s": 1_000.0, "train_loss_after": 6.0}
    b = {"peak_memory_mib": 150.0, "runtime_s": 12.5, "tokens_per_s": 800.0, "train_loss_after": 6.25}
    write_pair(tmp_path, a=a, b=b)
    write_pair(tmp_path, "mp", a=a, b=a | {"peak_memory_mib": 200.9, "runtime_s": 10.2})
    rows, text = compare(tmp_path)
    assert rows["Peak memory, MiB A"] == ["200", "200"]
    assert rows["Peak memory, MiB B"] == ["150", "201"]
    assert rows["Peak memory, MiB difference"] == ["-25.0%", "+0.4%"]
    assert rows["Runtime, s difference"] == ["+25.0%", "+2.0%"]
    assert rows["Tokens/s difference"] == ["-20.0%", "="]
    assert rows["Loss after difference"] == ["+0.250", "="]
    assert "Difference: of B from A" in text
    less_is_better = [("better", "-25.0%"), ("worse", "+25.0%"), ("worse", "-20.0%"), ("worse", "+0.250")]
    assert marks(tmp_path) == less_is_better
    lora, _ = csv_rows(tmp_path / "b" / "comparison.csv")
    assert float(lora["runtime_s.difference"]) == 0.25
    assert (lora["combination"], lora["status.A"], lora["peak_memory_mib.B"]) == ("lora", "ok", "150.0")


def test_a_row_that_failed_on_one_side_is_marked_changed(tmp_path: Path) -> None:
    for name, a, b in (("baseline", "oom", "ok"), ("mp", "oom", "oom"), ("ga", "oom", "error")):
        write(tmp_path / "a", name, a)
        write(tmp_path / "b", name, b)
    rows, text = compare(tmp_path)
    assert rows["Peak memory, MiB A"] == ["×", "×", "×"]
    assert rows["Peak memory, MiB B"] == ["100", "×", "error"]
    assert rows["Runtime, s difference"] == ["changed", "=", "changed"]
    assert "ga in B: why ga is error" in text
    assert ("changed", "changed") in marks(tmp_path)


@pytest.mark.parametrize("value", [0.0, None, math.nan, math.inf])
def test_no_share_is_taken_of_what_is_no_number(tmp_path: Path, value: float | None) -> None:
    write_pair(tmp_path, a={"tokens_per_s": value, "train_loss_after": math.nan if value is None else value})
    rows, _ = compare(tmp_path)
    assert rows["Tokens/s difference"] == ["changed"]
    assert rows["Loss after difference"] == ["+6.125" if value == 0 else "changed"]


def test_rows_of_one_folder_only_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path)
    for side, name in (("a", "mp"), ("a", "ga_mp"), ("b", "ga"), ("b", "baseline,lora.rank=8")):
        write(tmp_path / side, name)
    rows, text = compare(tmp_path)
    assert rows["LoRA"] == ["ON"]
    assert "- Only in A: tiny · sample: mp, ga_mp" in text
    assert "- Only in B: tiny · sample: ga" in text
    assert "- Only in B: tiny · sample · lora.rank=8: baseline" in text
    assert "Only in A: tiny · sample: mp, ga_mp" in page_of(tmp_path).text


def test_settings_that_differ_are_listed_once_each(tmp_path: Path) -> None:
    for name in ("baseline", "lora"):
        a, b = ({"versions": VERSIONS | {"torch": torch}} for torch in ("2.13.0", "2.14.0"))
        write_pair(tmp_path, name, a, b | {"memory_limit_mib": 300, "device": "another"})
        other = CONFIG.replace("rank: 16", "rank: 8").replace("memory_limit_mib: null", "memory_limit_mib: 300")
        other = other.replace("{name: auto, memory_mib: null}", "{name: a100_40gb, memory_mib: 40441}")  # one line
        # What is not compared.
        other = other.replace("mode: auto", "mode: off").replace("~/.cache", "other").replace("every: null", "every: 1")
        (tmp_path / "b" / name / "config.yaml").write_text(other)
    _, text = compare(tmp_path)
    assert [line.removeprefix("- ") for line in text.splitlines() if " in A, " in line] == [
        "device: a processor in A, another in B",
        "gpu.name: auto in A, a100_40gb in B",
        "lora.rank: 16 in A, 8 in B",
        "measure.memory_limit_mib: null in A, 300 in B",
        "torch: 2.13.0 in A, 2.14.0 in B",
    ]
    page = page_of(tmp_path)
    assert ["Not the same", "A", "B"] in page.rows
    assert ["lora.rank", "16", "8"] in page.rows
    assert SAME_SETTINGS not in text + page.text


def test_without_a_config_the_results_are_compared(tmp_path: Path) -> None:
    write_pair(tmp_path, b={"techniques": TECHNIQUES | {"lora": {"rank": 8}}})
    for side in ("a", "b"):
        (tmp_path / side / "lora" / "config.yaml").unlink()
    listed = [line for line in compare(tmp_path)[1].splitlines() if " in A, " in line]
    assert listed == ["- lora.rank: 16 in A, 8 in B"]


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path)
    file = tmp_path / "b" / "lora" / "config.yaml"
    file.write_text("a: [")
    done = report(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert not list((tmp_path / "b").glob("comparison*"))


def test_groups_are_compared_with_their_likes(tmp_path: Path) -> None:
    """Two sweeps of other settings beside each other, as where one went on after a change, in both folders."""
    for side, hashes in (("a", "xy"), ("b", "yx")):
        for folder, settings_hash in zip(("mp", "mp once more"), hashes, strict=True):
            values = {"combination": "mp", "optim": optim("mp"), "settings_hash": settings_hash}
            write(tmp_path / side, folder, peak_memory_mib=100.0 if settings_hash == "x" else 300.0, **values)
    with undrawn():
        done = report(tmp_path / "a", tmp_path / "b")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line for line in lines if line[:1] == ["difference"]] == [["difference", "="]] * 8
    assert "Only in" not in done.stdout


def test_losses_of_both_are_in_one_picture(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_steps(tmp_path / "a" / "lora", 12)
    write_steps(tmp_path / "b" / "lora", 24)
    assert report(tmp_path / "a", tmp_path / "b").returncode == 0
    (svg,) = page_of(tmp_path).pictures("LoRA: loss").values()
    (a,), (b,) = paths(svg, "#999999"), paths(svg)
    assert (len(a), len(b)) == (12, 24)
    assert a[-1] == pytest.approx(b[11], abs=0.15)  # on the same axes


def test_a_comparison_escapes_is_the_same_each_time_and_has_a_picture(tmp_path: Path) -> None:
    write_pair(tmp_path, a={"model": EVIL, "device": f"$x$ {EVIL}"}, b={"model": EVIL, "device": "another"})
    seen = []
    for _ in range(2):
        assert report(tmp_path / "a", tmp_path / "b").returncode == 0
        seen.append([(tmp_path / "b" / name).read_bytes() for name in FILES])
    assert seen[0] == seen[1]
    assert EVIL in page_of(tmp_path).text
    with Image.open(tmp_path / "b" / "comparison.png") as image:
        colors = {color[:3] for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x99, 0x99, 0x99), (0x00, 0x72, 0xB2)} <= colors  # A's bars and B's


def test_sweeps_without_a_common_run_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", "baseline")
    write(tmp_path / "b", "baseline", model="llama2_7b")
    write(tmp_path / "b", "lora")
    done = report(tmp_path / "a", tmp_path / "b")
    assert (done.returncode, done.stdout) == (2, "")
    reason = "have no run of the same model, data and combination"
    assert done.stderr == f"error: {tmp_path / 'a'} and {tmp_path / 'b'} {reason}\n"
    assert not list((tmp_path / "b").glob("comparison*"))
