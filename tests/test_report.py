"""`python -m llama_ft.report DIR` on results made by hand, so that every number of the report is known beforehand.

The page is looked at in test_page.py.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest.mock import patch

import pytest
from conftest import run
from PIL import Image
from rich.console import Console

from llama_ft.config import UserError
from llama_ft.reporting import figure, page
from llama_ft.reporting.comparison import report_comparison
from llama_ft.reporting.sweep import FILES, report_sweep

CATEGORIES = ("parameter", "gradient", "optimizer_state", "activation", "other")
TECHNIQUES = {"ga": {"steps": 8}, "mp": {"frozen_weights": "compute"}, "lora": {"rank": 16}, "gc": {"every": 1}}
MEASURED = (
    "device runtime_s samples tokens tokens_per_s peak_memory_mib peak_memory_reserved_mib peak_rss_mib memory_mib"
    " memory_max_mib peak_phase ledger trainable_params total_params trainable_percent loss_first loss_last"
    " train_loss_before train_loss_after versions"
).split()


def write(folder: Path, name: str, status: str = "ok", **values: Any) -> dict[str, Any]:
    """A run's result in `folder/name`; what was measured is null unless the run is ok, as in real ones."""
    combination = name.partition(",")[0]
    result: dict[str, Any] = {
        "schema_version": 1,
        "status": status,
        "error": None if status == "ok" else f"why {combination} is {status}",
        "config_hash": f"hash of {name}",
        "combination": combination,
        "model": "tiny",
        "data": "sample",
        "gpu": "auto",
        "optim": {key: key in combination.split("_") for key in TECHNIQUES},
        "techniques": TECHNIQUES,
        "micro_batch_size": 1,
        "memory_limit_mib": None,
        "command": "python -m llama_ft.train",
    }
    result |= dict.fromkeys(MEASURED)
    if status == "ok":
        peak = values.get("peak_memory_mib", 100.0)
        shares = dict(zip(CATEGORIES, (0.4, 0.2, 0.2, 0.15, 0.05), strict=True))
        result |= {
            "device": "a processor",
            "runtime_s": 10.0,
            "samples": 200,
            "tokens": 14_000,
            "tokens_per_s": 1_400.0,
            "peak_memory_mib": peak,
            "peak_rss_mib": 2.5 * peak,
            "memory_mib": {category: share * peak for category, share in shares.items()},
            "memory_max_mib": {category: 1.5 * share * peak for category, share in shares.items()},
            "breakdown": [],
            "trainable_params": 1_000,
            "total_params": 4_000,
            "trainable_percent": 25.0,
            "loss_first": 7.5,
            "loss_last": 6.5,
            "train_loss_before": 7.25,
            "train_loss_after": 6.125,
            "versions": {},
        }
    result |= values
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps(result))
    return result


@contextmanager
def undrawn() -> Iterator[None]:
    """Pictures are left out: drawing takes most of a report's time."""
    nothing = {"draw_table2": None, "draw_comparison": None, "table2_panels": [b""] * 2, "comparison_panels": [b""] * 2}
    with ExitStack() as stack:
        for name, value in nothing.items():
            module = page if name == "table2_panels" else figure
            stack.enter_context(patch.object(module, name, lambda *_, value=value: value))
        yield


def report(*folders: Path, columns: int = 80, terminal: bool = False) -> CompletedProcess[str]:
    """As the command would end, without starting it: a process for each test would take seconds."""
    out = io.StringIO()
    console = Console(file=out, width=columns, force_terminal=terminal, no_color=True)
    try:
        (report_sweep if len(folders) == 1 else report_comparison)(*folders, console)
    except UserError as error:
        return CompletedProcess([], 2, out.getvalue(), f"error: {error}\n")
    return CompletedProcess([], 0, out.getvalue(), "")


def tables(text: str) -> list[dict[str, list[str]]]:
    """The tables of a Markdown text; each is its rows' cells by the row's name, names repeated get a second mark."""
    found: list[dict[str, list[str]]] = []
    for header, lines in itertools.groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if header:
            found.append({})
            for line in lines:
                name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
                found[-1][name if name not in found[-1] else f"{name} (2)"] = cells
    return found


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "table2.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------- one sweep with every ending in it


@pytest.fixture(scope="module")
def half_finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven of eight rows, in every status; the eighth is still running."""
    folder = tmp_path_factory.mktemp("report") / "sweep"
    write(folder, "baseline", peak_memory_mib=200.0, runtime_s=50.0)
    write(folder, "lora", peak_memory_mib=50.0, runtime_s=25.0)
    write(folder, "mp", "oom", memory_limit_mib=300)
    write(folder, "mp_lora", "killed")
    write(folder, "ga", peak_memory_mib=302.0, runtime_s=62.5)
    write(folder, "ga_lora", "error")
    write(folder, "ga_mp", "interrupted")
    (folder / "ga_mp_lora").mkdir()
    (folder / "ga_mp_lora" / "metrics.jsonl").write_text('{"step": 1, "loss": 7')
    return folder


@pytest.fixture(scope="module")
def reported(half_finished: Path) -> tuple[CompletedProcess[str], Path]:
    return run("llama_ft.report", str(half_finished), cwd=half_finished.parent), half_finished


def test_a_half_finished_sweep_has_a_report(reported: Any) -> None:
    done, folder = reported
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert str(folder) in done.stdout


def test_markdown_holds_the_rows_that_there_are_in_the_order_of_the_course(reported: Any) -> None:
    (table,) = tables((reported[1] / "table2.md").read_text())
    assert table["GA"] == ["OFF"] * 4 + ["ON"] * 3
    assert table["MP"] == ["OFF", "OFF", "ON", "ON", "OFF", "OFF", "ON"]
    assert table["LoRA"] == ["OFF", "ON", "OFF", "ON", "OFF", "ON", "OFF"]
    assert "GC" not in table


def test_each_ending_has_its_mark_and_numbers_are_relative_to_the_baseline(reported: Any) -> None:
    (table,) = tables((reported[1] / "table2.md").read_text())
    assert table["Peak memory, MiB"] == ["200", "50.0", "×", "killed", "302", "error", "stopped"]
    assert table["of baseline"] == ["100%", "25%", "×", "killed", "151%", "error", "stopped"]
    assert table["Runtime, s"] == ["50.0", "25.0", "×", "killed", "62.5", "error", "stopped"]
    assert table["of baseline (2)"] == ["100%", "50%", "×", "killed", "125%", "error", "stopped"]
    assert table["Peak RSS, MiB"][:2] == ["500", "125"]


def test_notes_say_why_rows_failed_and_what_the_table_means(reported: Any) -> None:
    text = (reported[1] / "table2.md").read_text()
    for combination, status in (("mp_lora", "killed"), ("ga_lora", "error"), ("ga_mp", "interrupted")):
        assert f"{combination}: why {combination} is {status}" in text
    assert "why mp is oom" not in text  # × says it
    assert "every 8 samples instead of every 1" in text
    assert "2**20" in text


def test_csv_holds_every_number_unrounded(reported: Any) -> None:
    rows = csv_rows(reported[1])
    results = {file.parent.name: json.loads(file.read_text()) for file in reported[1].glob("*/result.json")}
    assert {row["combination"] for row in rows} == results.keys()
    for row in rows:
        result = results[row["combination"]]
        assert row["status"] == result["status"]
        assert [row[name] for name in TECHNIQUES] == [str(on) for on in result["optim"].values()]
        for key in ("peak_memory_mib", "peak_rss_mib", "runtime_s", "tokens_per_s", "trainable_percent"):
            assert row[key] == ("" if result[key] is None else str(result[key]))
        for part, category in itertools.product(("memory_mib", "memory_max_mib"), CATEGORIES):
            value = (result[part] or {}).get(category)
            assert row[f"{part}.{category}"] == ("" if value is None else str(value))


def test_picture_is_an_image_with_something_in_it(reported: Any) -> None:
    file = reported[1] / "table2.png"
    with Image.open(file) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 600
        assert image.height > 300
        colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colours  # the bars of parameters and gradients


def test_a_report_changes_nothing_but_its_own_files(reported: Any) -> None:
    folder = reported[1]
    before = {file: file.read_bytes() for file in folder.rglob("*.json*")}
    assert report(folder).returncode == 0
    assert {file: file.read_bytes() for file in folder.rglob("*.json*")} == before
    assert {file.name for file in folder.iterdir() if file.is_file()} == set(FILES)


# --------------------------------------------------------------------------------------------------- other sweeps


def test_without_a_baseline_nothing_is_relative(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    write(folder, "lora")
    write(folder, "mp", "oom")
    assert report(folder).returncode == 0
    (table,) = tables((folder / "table2.md").read_text())
    assert table["Peak memory, MiB"] == ["100", "×"]
    assert table["of baseline"] == ["–", "–"]


def test_a_baseline_out_of_memory_is_none_to_compare_with(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    write(folder, "baseline", "oom", memory_limit_mib=40_000)
    write(folder, "lora", memory_limit_mib=40_000)
    done = report(folder)
    assert done.returncode == 0
    (table,) = tables((folder / "table2.md").read_text())
    assert table["Peak memory, MiB"] == ["×", "100"]
    assert table["of baseline"] == ["–", "–"]
    assert "40,000 MiB" in done.stdout


def combinations() -> Iterator[str]:
    for gc, ga, mp, lora in itertools.product((False, True), repeat=4):
        names = [name for name, on in (("ga", ga), ("mp", mp), ("lora", lora), ("gc", gc)) if on]
        yield "_".join(names) or "baseline"


def table_lines(text: str) -> list[str]:
    names = ("GA", "MP", "LoRA", "GC", "Peak", "of baseline", "Runtime", "Tokens/s", "Loss before", "Loss after")
    return [line for line in text.splitlines() if line.strip().startswith(names) and ":" not in line]


def test_sixteen_combinations_become_two_tables_side_by_side_no_wider_than_80_columns(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for name in combinations():
        write(folder, name)
    with undrawn():
        done = report(folder)
    (table,) = tables((folder / "table2.md").read_text())
    assert table["GC"] == ["OFF"] * 8 + ["ON"] * 8
    assert table["GA"] == (["OFF"] * 4 + ["ON"] * 4) * 2
    assert table["Peak memory, MiB"] == ["100"] * 16
    assert [line.split() for line in table_lines(done.stdout) if line.strip().startswith("GC")] == [
        ["GC"] + ["OFF"] * 8,
        ["GC"] + ["ON"] * 8,
    ]
    assert "GC is off" not in done.stdout


def test_the_table_of_a_real_sweep_fits_into_80_columns_whole(tmp_path: Path) -> None:
    """Eight columns with the widest numbers that a 7B or 70B sweep has, and words."""
    folder = tmp_path / "sweep"
    names = list(combinations())[:8]
    for number, name in enumerate(names[:6]):
        size = {"peak_memory_mib": 103_456.7 + number, "peak_memory_reserved_mib": 113_456.7, "runtime_s": 12_345.6}
        write(folder, name, model="llama2_7b", **size)
    write(folder, names[6], "killed", model="llama2_7b")
    write(folder, names[7], "interrupted", model="llama2_7b")
    with undrawn():
        lines = report(folder).stdout.splitlines()
    rows = [line.split()[-8:] for line in lines]
    assert [f"{103_457 + n:,}" for n in range(6)] + ["killed", "stopped"] in rows
    assert ["113,457"] * 6 + ["killed", "stopped"] in rows
    assert ["12,346"] * 6 + ["killed", "stopped"] in rows
    header = next(index for index, line in enumerate(lines) if line.split() == ["GA"] + ["OFF"] * 4 + ["ON"] * 4)
    body = lines[header : header + 12]
    assert max(len(line.rstrip()) for line in body) <= 80
    assert "…" not in "".join(body)


def test_two_models_are_two_tables(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for model, peak in (("tiny", 100.0), ("llama2_7b", 50_000.0)):
        write(folder, f"baseline,model={model}", model=model, peak_memory_mib=peak)
        write(folder, f"lora,model={model}", model=model, peak_memory_mib=peak / 4)
    done = report(folder)
    big, small = tables((folder / "table2.md").read_text())
    assert big["Peak memory, MiB"] == ["50,000", "12,500"]
    assert small["Peak memory, MiB"] == ["100", "25.0"]
    assert big["of baseline"] == small["of baseline"] == ["100%", "25%"]
    assert [(row["model"], row["combination"]) for row in csv_rows(folder)] == [
        (model, name) for model in ("llama2_7b", "tiny") for name in ("baseline", "lora")
    ]
    assert done.stdout.count("Peak memory, MiB") == 2
    with Image.open(folder / "table2.png") as image:
        image.verify()


def test_one_run_alone_has_a_report_too(tmp_path: Path) -> None:
    write(tmp_path, "baseline")
    assert report(tmp_path / "baseline").returncode == 0
    (table,) = tables((tmp_path / "baseline" / "table2.md").read_text())
    assert table["Peak memory, MiB"] == ["100"]


# ------------------------------------------------------------------------------------------------------------- errors


def damaged(folder: Path, text: str) -> Path:
    (folder / "sweep" / "lora").mkdir(parents=True)
    (folder / "sweep" / "lora" / "result.json").write_text(text)
    return folder / "sweep"


@pytest.mark.parametrize(
    "text",
    ["", '{"schema_version": 1, "sta', "[1, 2]", "null", '{"schema_version": 2}', '{"schema_version": 1}', "\x00\x01"],
)
def test_a_damaged_result_is_named_and_nothing_is_written(tmp_path: Path, text: str) -> None:
    folder = damaged(tmp_path, text)
    write(folder, "baseline")
    done = report(folder)
    assert done.returncode == 2
    assert str(folder / "lora" / "result.json") in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(folder.glob("table2.*"))


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, reason in ((tmp_path / "missing", "no such folder"), (tmp_path / "empty", "no result.json")):
        done = report(folder)
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.strip().splitlines()
        assert str(folder) in line
        assert reason in line


def test_a_folder_is_asked_for(tmp_path: Path) -> None:
    done = run("llama_ft.report", cwd=tmp_path)
    assert done.returncode == 2
    assert "DIR" in done.stderr.strip().splitlines()[-1]


def test_a_file_that_cannot_be_written_is_said_in_a_line_and_none_is_left_half(tmp_path: Path) -> None:
    write(tmp_path, "baseline")
    (tmp_path / "report.html").mkdir()
    done = report(tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: the report cannot be written into {tmp_path}: Is a directory\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["baseline", *FILES])  # nothing temporary


@pytest.mark.parametrize("columns", [30, 60, 140])
def test_a_narrow_terminal_cuts_no_number(tmp_path: Path, columns: int) -> None:
    for number, name in enumerate(("baseline", "lora", "mp", "mp_lora", "ga", "ga_lora", "ga_mp", "ga_mp_lora")):
        write(tmp_path, name, peak_memory_mib=103_000.0 + number)
    with undrawn():
        done = report(tmp_path, columns=columns)
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert all(f"103,00{number}" in done.stdout for number in range(8))


def test_runs_with_other_settings_or_on_another_device_have_tables_of_their_own(tmp_path: Path) -> None:
    for name, values in {"baseline": {}, "mp": {"settings_hash": "b"}, "lora": {"device": "another"}}.items():
        file = tmp_path / name / "result.json"
        result = write(tmp_path, name) | {"settings_hash": "a"} | values
        file.write_text(json.dumps(result))
    assert report(tmp_path).returncode == 0
    assert (tmp_path / "table2.md").read_text().count("### ") == 3


def test_a_run_that_was_refused_stands_in_its_sweeps_table(tmp_path: Path) -> None:
    """It has no hashes, and its values, such as the batch, may be any."""
    write(tmp_path, "ga", settings_hash="a")
    refused = {"config_hash": None, "settings_hash": None, "micro_batch_size": -1, "gpu": "auto"}
    write(tmp_path, "baseline", "error", error="training.micro_batch_size=-1 is not allowed", **refused)
    assert report(tmp_path).returncode == 0
    text = (tmp_path / "table2.md").read_text()
    (table,) = tables(text)
    assert table["Peak memory, MiB"] == ["error", "100"]
    assert "every 8 samples instead of every 1." in text


def test_the_result_of_an_earlier_version_has_a_report(tmp_path: Path) -> None:
    """It holds the keys of schema 1 that are always there, and what was measured then."""
    result = write(tmp_path, "baseline")
    later = (
        "train_loss_before",
        "train_loss_after",
        "peak_memory_reserved_mib",
        "peak_phase",
        "tokens_per_s",
        "breakdown",
    )
    old = {key: value for key, value in result.items() if key not in later}
    (tmp_path / "baseline" / "result.json").write_text(json.dumps(old))
    assert report(tmp_path).returncode == 0
    (table,) = tables((tmp_path / "table2.md").read_text())
    assert table["Peak memory, MiB"] == ["100"]
    assert "Loss after" not in table


def test_notes_are_broken_at_the_width_of_a_terminal_and_whole_in_a_file(tmp_path: Path) -> None:
    write(tmp_path, "baseline")
    write(tmp_path, "lora", "error", error="one two three " * 20)
    shown = report(tmp_path, terminal=True).stdout
    assert max(len(line.rstrip()) for line in shown.splitlines() if str(tmp_path) not in line) <= 80 + len(
        "\x1b[2m\x1b[0m"
    )
    assert f"lora: {('one two three ' * 20).strip()}" in report(tmp_path).stdout


def test_the_limit_is_in_the_picture_where_it_is_one_on_the_allocator() -> None:
    def result(reserved: float | None, limit: int | None) -> dict[str, Any]:
        key = {"peak_memory_mib": 30_000.0, "peak_memory_reserved_mib": reserved, "memory_limit_mib": limit}
        return {"status": "ok", **key}

    assert figure.limit_in_picture([result(33_000.0, 40_000)]) == 40_000
    assert figure.limit_in_picture([result(33_000.0, None)]) is None
    assert figure.limit_in_picture([result(33_000.0, 500_000)]) is None  # the bars would be slivers
    assert figure.limit_in_picture([result(None, 40_000)]) is None  # on the CPU it is one on the process
