"""`python -m llama_ft.report DIR` on results made by hand. The pages are looked at in test_page.py."""

import itertools
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from helpers.reports import (
    CATEGORIES,
    EIGHT,
    SIXTEEN,
    SWITCHES,
    Page,
    csv_rows,
    report,
    tables,
    undrawn,
    write,
    write_steps,
    write_varied,
)
from PIL import Image

from llama_ft.config import techniques
from llama_ft.records.result import Result, read_result, write_result
from llama_ft.reporting import figure, reading, results, table, table2
from llama_ft.reporting.reports import SWEEP_FILES
from llama_ft.reporting.run_table import gathered

# -------------------------------------------------------------------------------- one sweep with every ending in it


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The command on seven of eight rows, in every status; the eighth is still running."""
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
    return run("llama_ft.report", str(folder), cwd=folder.parent), folder


@pytest.mark.process
def test_rows_are_in_the_order_of_the_course_and_each_ending_has_its_mark(reported: Any) -> None:
    assert (reported[0].returncode, reported[0].stderr) == (0, "")
    assert str(reported[1]) in reported[0].stdout
    (table,) = tables((reported[1] / "table2.md").read_text())
    assert table["GA"] == ["OFF"] * 4 + ["ON"] * 3
    assert table["MP"] == ["OFF", "OFF", "ON", "ON", "OFF", "OFF", "ON"]
    assert table["LoRA"] == ["OFF", "ON", "OFF", "ON", "OFF", "ON", "OFF"]
    assert "GC" not in table
    assert table["Peak memory, MiB"] == ["200", "50.0", "×", "killed", "302", "error", "stopped"]
    assert table["of baseline"] == ["100%", "25%", "×", "killed", "151%", "error", "stopped"]
    assert table["Runtime, s"] == ["50.0", "25.0", "×", "killed", "62.5", "error", "stopped"]
    assert table["of baseline (2)"] == ["100%", "50%", "×", "killed", "125%", "error", "stopped"]
    assert table["Peak RSS, MiB"][:2] == ["500", "125"]


@pytest.mark.process
def test_notes_say_why_rows_failed_and_what_the_table_means(reported: Any) -> None:
    text = (reported[1] / "table2.md").read_text()
    for combination, status in (("mp_lora", "killed"), ("ga_lora", "error"), ("ga_mp", "interrupted")):
        assert f"{combination}: why {combination} is {status}" in text
    assert "why mp is oom" not in text  # × says it
    assert "every 8 samples instead of every 1" in text
    assert "GC is off." in text


@pytest.mark.process
def test_csv_holds_every_number_unrounded(reported: Any) -> None:
    rows = csv_rows(reported[1] / "table2.csv")
    assert {row["combination"] for row in rows} == {*EIGHT} - {"ga_mp_lora"}
    for row in rows:
        result = asdict(read_result(reported[1] / row["combination"]))
        values = result | {f"{part}.{c}": (result[part] or {}).get(c) for part, c in PARTS} | result["optim"]
        for key in ("status", "peak_memory_mib", "peak_rss_mib", "runtime_s", "trainable_percent", *SWITCHES):
            assert row[key] == ("" if values[key] is None else str(values[key]))
        assert row["memory_max_mib.activation"] == str(values["memory_max_mib.activation"] or "")


PARTS = list(itertools.product(("memory_mib", "memory_max_mib"), CATEGORIES))


@pytest.mark.process
def test_picture_is_an_image_with_something_in_it(reported: Any) -> None:
    with Image.open(reported[1] / "table2.png") as image:
        assert image.format == "PNG"
        assert (image.width, image.height) > (600, 300)
        colors = {color[:3] for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colors  # the bars of parameters and gradients


@pytest.mark.process
def test_a_report_changes_nothing_but_its_own_files(reported: Any) -> None:
    folder = reported[1]
    before = {file: file.read_bytes() for file in folder.rglob("*.json*")}
    assert report(folder).returncode == 0
    assert {file: file.read_bytes() for file in folder.rglob("*.json*")} == before
    assert {file.name for file in folder.iterdir() if file.is_file()} == {*SWEEP_FILES} - {"losses.png", "pareto.png"}


# --------------------------------------------------------------------------------------------------- other sweeps


@pytest.mark.parametrize("baseline", [False, True])
def test_without_a_finished_baseline_nothing_is_relative(tmp_path: Path, baseline: bool) -> None:
    if baseline:
        write(tmp_path, "baseline", "oom", memory_limit_mib=40_000)
    write(tmp_path, "lora")
    with undrawn():
        assert ("40,000 MiB" in report(tmp_path).stdout) == baseline
    (table,) = tables((tmp_path / "table2.md").read_text())
    assert table["Peak memory, MiB"] == ["×", "100"][1 - baseline :]
    assert table["of baseline"] == ["–", "–"][1 - baseline :]


def test_sixteen_combinations_become_two_tables_side_by_side(tmp_path: Path) -> None:
    for name in SIXTEEN:
        write(tmp_path, name)
    with undrawn():
        shown = report(tmp_path).stdout
    (table,) = tables((tmp_path / "table2.md").read_text())
    assert table["GC"] == ["OFF"] * 8 + ["ON"] * 8
    assert table["GA"] == (["OFF"] * 4 + ["ON"] * 4) * 2
    assert table["Peak memory, MiB"] == ["100"] * 16
    lines = [line.split() for line in shown.splitlines() if line.startswith("GC ")]
    assert lines == [["GC"] + ["OFF"] * 8, ["GC"] + ["ON"] * 8]
    assert "GC is off" not in shown


def test_the_table_of_a_real_sweep_fits_into_80_columns_whole(tmp_path: Path) -> None:
    """Eight columns with the widest numbers that a 7B or 70B sweep has, and words."""
    for number, name in enumerate(EIGHT[:6]):
        size = {"peak_memory_mib": 103_456.7 + number, "peak_memory_reserved_mib": 113_456.7, "runtime_s": 12_345.6}
        write(tmp_path, name, **size)
    write(tmp_path, EIGHT[6], "killed")
    write(tmp_path, EIGHT[7], "interrupted")
    with undrawn():
        lines = report(tmp_path).stdout.splitlines()
    rows = [line.split()[-8:] for line in lines]
    assert [f"{103_457 + n:,}" for n in range(6)] + ["killed", "stopped"] in rows
    assert ["12,346"] * 6 + ["killed", "stopped"] in rows
    header = next(index for index, line in enumerate(lines) if line.split() == ["GA"] + ["OFF"] * 4 + ["ON"] * 4)
    body = lines[header : header + 12]
    assert max(len(line.rstrip()) for line in body) <= 80
    assert "…" not in "".join(body)


def test_notes_are_broken_at_the_width_of_a_terminal_and_whole_in_a_file(tmp_path: Path) -> None:
    write(tmp_path, "lora", "error", error="one two three " * 20)
    with undrawn():
        shown = report(tmp_path, terminal=True).stdout.replace("\x1b[2m", "").replace("\x1b[0m", "")
        assert f"lora: {('one two three ' * 20).strip()}" in report(tmp_path).stdout
    assert max(len(line.rstrip()) for line in shown.splitlines() if str(tmp_path) not in line) <= 80


def test_two_models_are_two_tables(tmp_path: Path) -> None:
    for model, peak in (("tiny", 100.0), ("llama2_7b", 50_000.0)):
        write(tmp_path, f"baseline,model={model}", model=model, peak_memory_mib=peak)
        write(tmp_path, f"lora,model={model}", model=model, peak_memory_mib=peak / 4)
    assert report(tmp_path).stdout.count("Peak memory, MiB") == 2
    big, small = tables((tmp_path / "table2.md").read_text())
    assert big["Peak memory, MiB"] == ["50,000", "12,500"]
    assert small["Peak memory, MiB"] == ["100", "25.0"]
    assert big["of baseline"] == small["of baseline"] == ["100%", "25%"]
    assert [(row["model"], row["combination"]) for row in csv_rows(tmp_path / "table2.csv")] == [
        (model, name) for model in ("llama2_7b", "tiny") for name in ("baseline", "lora")
    ]
    with Image.open(tmp_path / "table2.png") as image:
        image.verify()


def settings_of(rank: int, lr: float, **others: Any) -> dict[str, Any]:
    fixed = {"optim": {"lora": True}, "tracker": {"name": f"{rank}"}, "training": {"lr": lr, "epochs": 1}}
    return {"model": {"name": "tiny", "dim": 192}, "lora": {"rank": rank, "targets": ["wq"]}, **fixed} | others


def test_a_sweep_over_settings_is_one_table_sorted_with_the_best_marked(tmp_path: Path) -> None:
    """Ranks and rates as numbers, not as texts; what a tracker is told is no setting."""
    losses = {(16, 0.01): 4.5, (4, 0.01): 5.5, (16, 1e-05): 6.25, (4, 1e-05): 6.0}
    for (rank, lr), loss in losses.items():
        numbers = {"peak_memory_mib": 100.0 + rank, "runtime_s": 10.0, "train_loss_after": loss}
        write_varied(tmp_path, f"lora,lora.rank={rank},training.lr={lr}", settings_of(rank, lr), **numbers)
    write_varied(tmp_path, "lora,lora.rank=16,training.lr=0.1", settings_of(16, 0.1), "killed")
    write_varied(tmp_path, "lora,lora.rank=-1,training.lr=0.1", None, "error", config_hash=None)
    write_varied(tmp_path, "lora,lora.rank=4,training.lr=0.1", settings_of(4, 0.1), "oom")
    shown = report(tmp_path).stdout
    lines = [line.split() for line in shown.splitlines()]
    assert lines[1] == "tiny · sample, 200 samples · a processor · LoRA".split()
    assert shown.count("lora.rank") == 1
    start = next(number for number, line in enumerate(lines) if line[:2] == ["lora.rank", "training.lr"])
    assert lines[start + 2 : start + 9] == [
        ["-1", "0.1", *["error"] * 4],
        ["4", "1e-05", "*104", "10.0", "7.250", "6.000"],
        ["4", "0.01", "*104", "10.0", "7.250", "5.500"],
        ["4", "0.1", *["×"] * 4],
        ["16", "1e-05", "116", "10.0", "7.250", "6.250"],
        ["16", "0.01", "116", "10.0", "7.250", "*4.500"],
        ["16", "0.1", *["killed"] * 4],
    ]
    assert "rank=16, lr=0.1: why lora is killed" in shown
    (table,) = tables((tmp_path / "table2.md").read_text())
    assert next(iter(table.values())) == ["training.lr", "peak MiB", "runtime s", "loss before", "loss after"]
    rows = [(row["lora.rank"], row["training.lr"], row["status"]) for row in csv_rows(tmp_path / "table2.csv")]
    assert rows[:3] == [("-1", "0.1", "error"), ("4", "1e-05", "ok"), ("4", "0.01", "ok")]
    page = Page((tmp_path / "report.html").read_text())
    assert ["16", "0.01", "116", "10.0", "7.250", "*4.500"] in page.rows
    assert "rank=16, lr=0.01" in page.text
    with Image.open(tmp_path / "table2.png") as image:
        image.verify()


def test_long_settings_leave_room_for_the_bars(tmp_path: Path) -> None:
    """What of a model's sizes was typed is no setting of its own; of paths the picture has the ends."""
    for number in range(3):
        data = {"name": "x", "path": f"/{'long/' * 40}file {number}.jsonl"}
        model = {"name": "tiny", "dim": 192, "given": ["dim"] * (number > 0)}
        others = {"model": model, "checkpoint": f"/{'models/' * 20}{number}", "adapter": f"/{'runs/' * 20}{number}"}
        write_varied(tmp_path, f"lora,{number}", settings_of(number, 0.1, data=data, **others))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # axes without any width
        report(tmp_path)
    (table,) = tables((tmp_path / "table2.md").read_text())
    assert next(iter(table.values()))[:3] == ["data.path", "checkpoint", "adapter"]
    (group,) = gathered(reading.read_groups(tmp_path))
    assert group.labels[0].startswith("rank=0, path=…")
    assert "file 0.jsonl, checkpoint=…" in group.labels[0]


def test_techniques_models_and_devices_are_columns_of_such_a_table_too(tmp_path: Path) -> None:
    for number, (name, device) in enumerate((n, d) for n in ("tiny", "big") for d in ("one", "two")):
        model = {"name": name, "dim": 192 if name == "tiny" else 4096, "max_seq_len": 1024 + number}
        for combination in ("lora", "baseline") if number == 0 else ("lora",):
            config = settings_of(4, 0.1, model=model)
            write_varied(tmp_path, f"{combination},{number}", config, model=name, device=device)
    with undrawn():
        report(tmp_path)
    lines = [line.split(" | ") for line in (tmp_path / "table2.md").read_text().splitlines() if line.startswith("| ")]
    assert [cells[:4] for cells in lines] == [
        ["| techniques", "model.name", "model.max_seq_len", "device"],  # the model's name says dim
        ["| baseline", "tiny", "1024", "one"],
        ["| LoRA", "big", "1026", "one"],
        ["| LoRA", "big", "1027", "two"],
        ["| LoRA", "tiny", "1024", "one"],
        ["| LoRA", "tiny", "1025", "two"],
    ]


def test_a_few_sweeps_of_combinations_stay_tables_of_combinations(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        for name in ("baseline", "lora"):
            write_varied(tmp_path, f"{name},training.lr={lr}", settings_of(4, lr))
    with undrawn():
        report(tmp_path)
    assert [table["LoRA"] for table in tables((tmp_path / "table2.md").read_text())] == [["OFF", "ON"]] * 2


def test_a_page_of_many_runs_leaves_out_their_curves(tmp_path: Path) -> None:
    for rank in range(1, 18):
        write_varied(tmp_path, f"lora,lora.rank={rank}", settings_of(rank, 0.1))
        write_steps(tmp_path / f"lora,lora.rank={rank}", 2)
    with undrawn():
        report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.pictures("loss") == {}
    assert page.text.count("For its curves make a report of this run") == 17


def test_one_run_alone_has_a_report_too(tmp_path: Path) -> None:
    write(tmp_path, "baseline")
    assert report(tmp_path / "baseline").returncode == 0
    (table,) = tables((tmp_path / "baseline" / "table2.md").read_text())
    assert table["Peak memory, MiB"] == ["100"]


def test_runs_with_other_settings_or_on_another_device_have_tables_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "baseline", settings_hash="a")
    write(tmp_path, "mp", settings_hash="b")
    write(tmp_path, "lora", settings_hash="a", device="another")
    with undrawn():
        report(tmp_path)
    assert (tmp_path / "table2.md").read_text().count("### ") == 3


def test_names_are_text_to_spreadsheets_and_to_markdown(tmp_path: Path) -> None:
    write(tmp_path, "baseline", model="=1+1", data="*a* [b](c) `d` <e> | f")
    write(tmp_path, "lora", "error", error="@x", model="=1+1", data="*a* [b](c) `d` <e> | f")
    with undrawn():
        report(tmp_path)
    rows = csv_rows(tmp_path / "table2.csv")
    assert [(row["model"], row["error"]) for row in rows] == [("'=1+1", ""), ("'=1+1", "'@x")]
    assert r"\*a\* \[b\](c) \`d\` \<e\> \| f" in (tmp_path / "table2.md").read_text()


def test_a_run_that_was_refused_stands_in_its_sweeps_table(tmp_path: Path) -> None:
    """It has no hashes, and its values, such as the batch, may be any."""
    write(tmp_path, "ga", settings_hash="a")
    write(tmp_path, "baseline", "error", error="not allowed", config_hash=None, micro_batch_size=-1)
    with undrawn():
        report(tmp_path)
    text = (tmp_path / "table2.md").read_text()
    (table,) = tables(text)
    assert table["Peak memory, MiB"] == ["error", "100"]
    assert "every 8 samples instead of every 1." in text


def test_a_new_technique_has_its_row_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside results that were written before it was there."""
    dummy = techniques.Technique("dummy", "Dummy", "a technique", None, True, False)
    for module in (techniques, table, table2):
        monkeypatch.setattr(module, "TECHNIQUES", (*techniques.TECHNIQUES, dummy))
    write(tmp_path / "a", "baseline")
    with undrawn():
        assert "Dummy is off." in report(tmp_path / "a").stdout
    result = write(tmp_path / "a", "dummy")
    result.optim["dummy"] = True
    write_result(tmp_path / "a" / "dummy", result)
    for folders in ((tmp_path / "a",), (tmp_path / "a", tmp_path / "a")):
        with undrawn():
            assert report(*folders).returncode == 0
        (shown,) = tables((tmp_path / "a" / ("table2.md" if len(folders) == 1 else "comparison.md")).read_text())
        assert shown["Dummy"] == ["OFF", "ON"]
    assert [row["dummy"] for row in csv_rows(tmp_path / "a" / "table2.csv")] == ["False", "True"]
    assert "<b>Dummy</b>" in (tmp_path / "a" / "report.html").read_text()


def test_the_limit_is_in_the_picture_where_it_is_one_on_the_allocator() -> None:
    def shown(reserved: float | None, limit: int | None) -> int | None:
        result = Result("baseline", "tiny", "sample", "auto", {}, {}, 1, "", "ok", memory_limit_mib=limit)
        result.peak_memory_mib, result.peak_memory_reserved_mib = 30_000.0, reserved
        return figure.limit_in_picture(results.Group("", [results.Run(result)]))

    assert shown(33_000.0, 40_000) == 40_000
    assert shown(33_000.0, None) is None
    assert shown(33_000.0, 500_000) is None  # the bars would be slivers
    assert shown(None, 40_000) is None  # on the CPU it is one on the process


# ------------------------------------------------------------------------------------------------------------- errors


DAMAGED = ["", '{"schema_version": 2, "sta', "null", '{"schema_version": 1}', '{"model": "a"}', "[" * 10**5]


def test_an_edited_result_is_named(tmp_path: Path) -> None:
    write(tmp_path, "ga_mp_lora")
    file = tmp_path / "ga_mp_lora" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"optim": 1}))
    assert report(tmp_path).stderr.startswith(f"error: {file} is damaged: ")


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:30])
def test_a_damaged_or_old_result_is_named_and_nothing_is_written(tmp_path: Path, text: str) -> None:
    write(tmp_path, "baseline")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "result.json").write_text(text)
    done = report(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert str(tmp_path / "lora" / "result.json") in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("table2.*"))


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, reason in ((tmp_path / "missing", "no such folder"), (tmp_path / "empty", "no result.json")):
        done = report(folder)
        assert (done.returncode, done.stdout) == (2, "")
        assert str(folder) in done.stderr
        assert reason in done.stderr


@pytest.mark.process
def test_a_folder_is_asked_for(tmp_path: Path) -> None:
    done = run("llama_ft.report", cwd=tmp_path)
    assert done.returncode == 2
    assert "DIR" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("n_folders", "file"), [(1, "report.html"), (2, "comparison.html")])
def test_a_file_that_cannot_be_written_is_said_in_a_line(tmp_path: Path, n_folders: int, file: str) -> None:
    write(tmp_path, "baseline")
    (tmp_path / file).mkdir()
    with undrawn():
        done = report(*[tmp_path] * n_folders)
    what = "report" if n_folders == 1 else "comparison"
    assert done.stderr == f"error: the {what} cannot be written into {tmp_path}: Is a directory\n"
    assert not list(tmp_path.glob(".*"))  # nothing temporary
