"""How a plan is shown, on plans made by hand, so that every number shown is known beforehand."""

import copy
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from conftest import run
from PIL import Image
from rich.console import Console
from test_page import Page
from test_report import CATEGORIES, tables, write

from llama_ft import cli, report
from llama_ft.config import UserError
from llama_ft.planning.plan import SCHEMA_VERSION
from llama_ft.reporting import plan_file, plan_match
from llama_ft.reporting.plan import FILES, SHOWN, print_plan, report_plan, write_plan
from llama_ft.reporting.plan_check import report_check
from llama_ft.reporting.results import read_groups

NAMES = ("baseline", "lora", "mp", "mp_lora", "ga", "ga_lora", "ga_mp", "ga_mp_lora")
EVIL = "<script>alert('&\"')</script>"
Plan = dict[str, Any]


def memory(total: float) -> dict[str, float]:
    return {name: share * total for name, share in zip(CATEGORIES, (0.4, 0.2, 0.2, 0.15, 0.05), strict=True)}


def gpu(name: str, memory_mib: int | None = 40_325, device: str = "cuda") -> dict[str, Any]:
    return {"name": name, "device": device, "memory_mib": memory_mib, "context_mib": 500 if device == "cuda" else 0}


def row(name: str, card: dict[str, Any], peak: float = 20_000.0, seconds: float | None = 10.0) -> dict[str, Any]:
    """100 MiB are reserved beyond the peak; on the CPU nothing is, and nothing else is known."""
    on_cuda, there = card["device"] == "cuda", card["memory_mib"]
    reserved = peak + 100 if on_cuda else None
    required = peak + 600 if on_cuda else None
    instants = ("forward", "backward", "backward", "optimizer step")
    return {
        "optim": {key: key in name.split("_") for key in ("ga", "mp", "lora", "gc")},
        "combination": name,
        "gpu": card["name"],
        "error": None,
        "peak_memory_mib": peak,
        "phase": "backward",
        "memory_mib": memory(peak),
        "memory_max_mib": memory(1.5 * peak),
        "breakdown": [{"category": "parameter", "dtype": "float32", "mb": 0.4 * peak}],
        "reserved_mib": reserved,
        "context_mib": card["context_mib"],
        "required_mib": required,
        "total_memory_mib": there,
        "fits": None if required is None or there is None else required <= there,
        "margin_mib": None if required is None or there is None else there - required,
        "trainable_params": 1_000,
        "total_params": 4_000,
        "steps": 25,
        "samples": 200,
        "tokens": 14_000,
        "flops": {"bfloat16": 1e15} if "mp" in name else {"float32": 1e15},
        "bytes_moved": 1e13,
        "runtime_s": seconds,
        "tokens_per_s": None if seconds is None else 14_000 / seconds,
        "binds": None if seconds is None else "memory",
        "bound_s": None if seconds is None else {"memory": seconds},
        "timeline": [
            {"event": n, "phase": phase, "memory_mib": memory(peak * (n + 1) / 4)} for n, phase in enumerate(instants)
        ],
    }


def failed(name: str, card: dict[str, Any], error: str) -> dict[str, Any]:
    known = row(name, card)
    return dict.fromkeys(known) | {key: known[key] for key in ("optim", "combination", "gpu")} | {"error": error}


def plan_of(rows: list[dict[str, Any]], *cards: dict[str, Any], **values: Any) -> Plan:
    return {
        "schema_version": 1,
        "command": "python -m llama_ft.plan",
        "versions": {"torch": "2.13.0", "cuda": None},
        "model": "tiny",
        "data": {
            "name": "sample",
            "about": "200 samples",
            "is_stand_in": False,
            "samples": 200,
            "longest": 99,
            "tokens": 14_000,
        },
        "techniques": {
            "ga": {"steps": 8},
            "mp": {"dtype": "auto", "frozen_weights": "compute", "trainable_weights": "fp32"},
            "lora": {"rank": 16, "targets": ["wq", "wv"]},
            "gc": {"every": 1},
        },
        "training": {"micro_batch_size": 1, "epochs": 1},
        "gpus": list(cards),
        "time": {"kind": "bound", "about": "at best: at full rates"},
        "rows": rows,
        "table1": None,
        "advice": None,
    } | values


A100 = gpu("a100_40gb")


def one_card() -> Plan:
    """The eight on one card, of which the baseline and ga are too large; its lora fails."""
    sizes = dict.fromkeys(NAMES, 20_000.0) | {"baseline": 80_000.0, "ga": 102_846.5, "mp_lora": 39_725.0}
    rows = [row(name, A100, size, 40.0 if name == "baseline" else 10.0) for name, size in sizes.items()]
    rows[1] = failed("lora", A100, "mp.dtype=bf16:\nthe card has not got it")
    return plan_of(rows, A100)


def printed(plan: Plan, width: int = 80) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=width))
    return out.getvalue()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_plan(one_card(), folder)
    return folder


# ------------------------------------------------------------------------------------------------- one card


def test_all_files_are_written_and_the_plan_is_read_as_it_was(written: Path) -> None:
    assert sorted(file.name for file in written.iterdir()) == sorted(FILES)
    assert plan_file.read_plan(written) == one_card()
    assert plan_file.SCHEMA_VERSION == SCHEMA_VERSION  # the planner's


def test_numbers_in_are_numbers_shown(written: Path) -> None:
    (table,) = tables((written / "plan.md").read_text())
    assert table["GA"] == ["OFF"] * 4 + ["ON"] * 4
    assert table["Peak memory, MiB"] == "80,000 error 20,000 39,725 102,846 20,000 20,000 20,000".split()
    assert table["of baseline"][:5] == ["100%", "error", "25%", "50%", "129%"]
    assert table["during"][0] == "bwd"
    assert table["Reserved, MiB"][2] == "20,100"
    assert table["Needed, MiB"][:3] == ["80,600", "error", "20,600"]
    assert table["Fits"] == "× error yes yes × yes yes yes".split()  # mp_lora: to the very last MiB
    assert table["Margin, MiB"][:5] == ["-40,275", "error", "19,725", "0.00", "-63,122"]
    assert table["Runtime, at best"][:3] == ["40.0", "error", "10.0"]
    assert table["of baseline (2)"][:3] == ["100%", "error", "25%"]
    assert table["Tokens/s"][0] == "350"
    assert table["Bound by"][0] == "memory"


def test_notes_say_what_the_numbers_are(written: Path) -> None:
    text = (written / "plan.md").read_text()
    for words in (
        "tiny · sample, 200 samples · a100_40gb · predicted",
        "an update every 8 samples instead of every 1.",
        "frozen weights are stored in 16 bit",
        "MP computes in bfloat16.",
        "GC is off.",
        "expandable segments",
        "500 MiB for the CUDA context and its libraries; a100_40gb has 40,325 MiB.",
        "Data: 200 samples.",
        "Runtime: seconds, at best: at full rates.",
        "lora: mp.dtype=bf16: the card has not got it",
    ):
        assert words in text, words


def test_csv_holds_every_number_unrounded(written: Path) -> None:
    with (written / "plan.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [line["combination"] for line in found] == list(NAMES)
    for line, planned in zip(found, one_card()["rows"], strict=True):
        for key in (
            "peak_memory_mib",
            "reserved_mib",
            "required_mib",
            "margin_mib",
            "runtime_s",
            "fits",
            "error",
            "gpu",
        ):
            assert line[key] == ("" if planned[key] is None else str(planned[key]))
        for part in ("memory_mib", "memory_max_mib", "flops", "bound_s"):
            for name, value in (planned[part] or {}).items():
                assert float(line[f"{part}.{name}"]) == value


def test_picture_is_an_image(written: Path) -> None:
    with Image.open(written / "plan.png") as image:
        image.load()
        assert image.width > 600
        assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_the_page_needs_nothing_else_and_holds_every_cell(written: Path) -> None:
    text = (written / "plan.html").read_text()
    page = Page(text)
    assert not page.named("script") + page.named("link") + page.named("iframe")
    assert all(str(image["src"]).startswith("data:image/svg+xml;base64,") for image in page.named("img"))
    (table,) = tables((written / "plan.md").read_text())
    shown = {cells[0]: cells[1:] for cells in reversed(page.rows)}  # of two rows with one name the first
    for name in ("Peak memory, MiB", "Needed, MiB", "Fits", "Runtime, at best"):
        assert shown[name] == table[name]
    # Bars, runtime, and a timeline of each that runs.
    assert len(page.named("img")) == 2 + 7
    assert re.search(r"memory over a step, baseline.*memory over a step, MP\b.*The other combinations", text, re.DOTALL)
    assert "python -m llama_ft.plan" in page.text
    assert "torch 2.13.0" in page.text


def test_the_page_escapes_what_users_can_write(tmp_path: Path) -> None:
    card = gpu(EVIL)
    change = {"arrow": "↑", "before": 1.0, "after": 2.0, "unit": EVIL}
    cells = dict.fromkeys(plan_file.TABLE1_COLUMNS, change)
    table1 = {
        "baseline": EVIL,
        "rows": [{"technique": "ga", "name": "GA", "choice": EVIL, "cells": cells}],
        "notes": [],
    }
    plan = plan_of([row("baseline", card), failed("lora", card, EVIL)], card, model=EVIL, command=EVIL, table1=table1)
    plan |= {"advice": {"goal": "fit", "gpu": EVIL, "lines": [EVIL]}, "versions": {EVIL: EVIL}}
    plan["data"] |= {"name": EVIL, "about": EVIL}
    write_plan(plan, tmp_path)
    page = Page((tmp_path / "plan.html").read_text())
    assert page.named("script") == []
    assert page.text.count(EVIL) >= 9


@pytest.mark.parametrize("columns", [30, 60, 140])
def test_a_narrow_terminal_cuts_no_number(columns: int) -> None:
    plan = plan_of([row(name, A100, 103_000.0 + n) for n, name in enumerate(NAMES)], A100)
    text = printed(plan, columns)
    assert "…" not in text
    assert all(f"103,00{n}" in text for n in range(8))


def test_eight_combinations_of_a_large_model_are_beside_each_other_in_80_columns() -> None:
    text = printed(plan_of([row(name, A100, 103_000.0) for name in NAMES], A100), 80)
    assert [len(line.split()) for line in text.splitlines() if line.startswith("Peak memory")] == [3 + 8]
    assert max(len(line) for line in text.splitlines() if line[:2] != "  ") <= 80


def test_what_is_not_known_is_a_dash() -> None:
    for card in (gpu("cpu", None, "cpu"), gpu("new", None)):
        plan = plan_of([row("baseline", card, seconds=None), row("lora", card, seconds=None)], card)
        lines = {line[:16].strip(): line[16:].split() for line in printed(plan).splitlines() if line}
        assert lines["Fits"] == ["–", "–"]
        assert lines["Runtime, s"] == ["–", "–"]  # no bound is shown, so none is spoken of
        assert ("Needed, MiB" in lines) == (card["name"] == "new")
        assert "Margin, MiB" not in lines
        assert f"Runtime is not known where no rates are: gpu={card['name']}." in printed(plan)


def test_calibrated_runtimes_are_no_bound() -> None:
    text = printed(plan_of([row("lora", A100)], A100, time={"kind": "calibrated", "about": "learned from two runs"}))
    assert "at best" not in text
    assert "Runtime: seconds, learned from two runs." in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_the_letters_gets_others(encoding: str) -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as file:
        print_plan(one_card(), Console(file=file, width=80))
        file.flush()
        text = raw.getvalue().decode(encoding)
    assert "predicted" in text
    (fits,) = [line for line in text.splitlines() if line.startswith("Fits")]
    assert fits.replace("|", " ").split()[1] == ("x" if encoding == "ascii" else "×")


# ------------------------------------------------------------------------------------------------ several cards


def several() -> Plan:
    cards = [gpu("small", 16_000), gpu("large", 81_000), gpu("unknown", None)]
    rows = [row(name, card, size) for card in cards for name, size in (("baseline", 80_000.0), ("lora", 15_400.0))]
    rows[3] = failed("lora", cards[1], "no bf16")
    return plan_of(rows, *cards)


def test_several_cards_are_columns_with_their_memory(tmp_path: Path) -> None:
    write_plan(several(), tmp_path)
    needed, runtime = tables((tmp_path / "plan.md").read_text())
    assert needed["GPU"] == ["small", "large", "unknown"]
    assert needed["Memory, MiB"] == ["16,000", "81,000", "–"]
    assert needed["baseline"] == ["80,600 ×", "80,600", "80,600"]
    assert needed["LoRA"] == ["16,000", "error", "16,000"]
    assert runtime["baseline"] == ["10.0 ×", "10.0", "10.0"]
    text = (tmp_path / "plan.md").read_text()
    assert "lora on large: no bf16" in text
    assert "runtime, s at best" in text
    page = Page((tmp_path / "plan.html").read_text())
    alts = [image["alt"] for image in page.named("img")]
    assert alts[:4] == ["memory needed by card", *(f"memory by category, {name}" for name in needed["GPU"])]
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 1_000


def test_many_cards_on_a_narrow_terminal() -> None:
    cards = [gpu(f"card{n}_{10 + n}gb", 10_000 + n) for n in range(9)]
    text = printed(plan_of([row("baseline", card) for card in cards], *cards), 60)
    assert all(f"card{n}_{10 + n}gb" in text and f"10,00{n}" in text for n in range(9))


# ------------------------------------------------------------------------------------------------ Table 1, advice


def test_table_1_shows_arrows_with_the_numbers_behind_them() -> None:
    def change(arrow: str, before: float, after: float, unit: str = "MiB") -> dict[str, Any]:
        return {"arrow": arrow, "before": before, "after": after, "unit": unit}

    cells = {
        "parameter": change("↓", 25_736.5, 12_868.25),
        "gradient": change("–", 100.0, 100.0),
        "optimizer_state": change("↑", 51_473.04, 51_473.11),
        "activation": change("↑", 0.0, 32.25),
        "computation": change("–", 20.71, 20.71, "TFLOP"),
    }
    rows = [{"technique": "mp", "name": "MP", "choice": "frozen weights in 16 bit", "cells": cells}]
    plan = plan_of([row("baseline", A100)], A100, table1={"baseline": "fp32", "rows": rows, "notes": ["Said once."]})
    plan |= {"advice": {"goal": "fit", "gpu": "a100_40gb", "lines": ["Fastest: lora."], "more": 1}}
    text = printed(plan, 200)
    for words in (
        "MP: frozen weights in 16",
        "Parameter, MiB",
        "Computation, TFLOP",
        "↓ 25,736 → 12,868",
        "– 100",
        "↑ 51,473.0 → 51,473.1",  # as many decimals as tell them apart
        "↑ 0.00 → 32.2",
        "– 20.7",
        "Baseline: fp32",
        "Said once.",
        "goal=fit, gpu=a100_40gb",
        "Fastest: lora.",
    ):
        assert words in text, words
    assert text.index("Needed, MiB") < text.index("Parameter, MiB") < text.index("goal=fit")


# ------------------------------------------------------------------------------------------------ reading a plan


def damaged() -> Iterator[tuple[str, str]]:
    """Contents of plan.json, and what is said of them."""
    yield "{", "cannot be read"
    yield "[" * 100_000, "cannot be read"
    yield json.dumps(one_card()).replace("80000.0", "NaN"), "cannot be read"
    yield "[]", "schema_version 1"
    yield '{"schema_version": true}', "schema_version 1"
    yield json.dumps(one_card() | {"schema_version": 2}), "schema_version 1"
    changes: list[tuple[list[Any], Any, str]] = [
        (["model"], 3, "model is 3"),
        (["rows", 0, "peak_memory_mib"], None, "rows[0].peak_memory_mib is null"),
        (["rows", 2, "memory_mib", "gradient"], "x", 'rows[2].memory_mib.gradient is "x"'),
        (["rows", 0, "fits"], 1, "rows[0].fits is 1"),
        (["rows", 0, "optim"], {}, "rows[0].optim.ga is missing"),
        (["rows", 0, "timeline"], {}, "rows[0].timeline is no list"),
        (["rows", 0, "gpu"], "another", "rows are not one for each combination"),
        (["rows"], [], "rows are not one for each combination"),
        (["gpus", 0, "memory_mib"], True, "gpus[0].memory_mib is true"),
        (["advice"], {"goal": "fit"}, "advice.gpu is missing"),
        (["table1"], [], "table1 is no object"),
    ]
    for path, value, words in changes:
        plan = copy.deepcopy(one_card())
        place: Any = plan
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        yield json.dumps(plan), words


@pytest.mark.parametrize(("text", "words"), list(damaged()), ids=range(len(list(damaged()))))
def test_a_damaged_plan_is_named_and_nothing_is_written(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError) as raised:
        report_plan(tmp_path, Console(file=io.StringIO()))
    assert str(raised.value).startswith(str(tmp_path / "plan.json"))
    assert words in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "plan.md").mkdir()
    with pytest.raises(UserError, match=f"the plan cannot be written into {re.escape(str(tmp_path))}: Is a directory"):
        write_plan(one_card(), tmp_path)


# ------------------------------------------------------------------------------------- beside what was measured

H200 = {"device": "NVIDIA H200", "gpu": "auto"}


def sweep_and_plan(tmp_path: Path) -> tuple[Path, Path]:
    """Measured on an H200: 2 % less and 4 % more than predicted; runtimes twice and four times the bound."""
    sweep, folder, card = tmp_path / "sweep", tmp_path / "plan", gpu("h200_141gb", 143_000)
    write(sweep, "baseline", peak_memory_mib=102_000.0, peak_memory_reserved_mib=100_000.0, runtime_s=20.0, **H200)
    write(sweep, "lora", peak_memory_mib=20_000.0, peak_memory_reserved_mib=20_000.0, runtime_s=40.0, **H200)
    write(sweep, "mp", "oom", **H200)
    write(sweep, "ga_mp_lora", "killed", **H200)
    write(sweep, "ga", peak_memory_mib=102_000.0, peak_memory_reserved_mib=100_000.0, runtime_s=20.0, **H200)
    planned = {"baseline": 99_960.0, "lora": 20_800.0, "mp": 99_000.0, "ga_mp_lora": 9_000.0, "mp_lora": 9_000.0}
    folder.mkdir()
    plan = plan_of([row(name, card, size) for name, size in planned.items()], card)
    (folder / "plan.json").write_text(json.dumps(plan))
    return sweep, folder


def checked(sweep: Path, folder: Path) -> tuple[str, list[dict[str, str]]]:
    report_check(sweep, folder, Console(file=io.StringIO(), width=200))
    with (folder / "plan_check.csv").open(newline="") as file:
        return (folder / "plan_check.md").read_text(), list(csv.DictReader(file))


def test_prediction_beside_measurement_with_the_signed_error(tmp_path: Path) -> None:
    sweep, folder = sweep_and_plan(tmp_path)
    text, lines = checked(sweep, folder)
    (table,) = tables(text)
    # Sections repeat the names of their rows: peak, reserved, runtime, fits.
    assert table["measured"] == ["102,000", "20,000", "×", "killed"]
    assert table["predicted"] == ["99,960", "20,800", "99,000", "9,000"]
    assert table["error"] == ["-2.0%", "+4.0%", "–", "–"]
    assert "Peak memory: absolute error 3.0% in the mean, 3.0% in the median, at worst +4.0% (lora)." in text
    assert "Runtime: absolute error 62.5% in the mean, 62.5% in the median, at worst -75.0% (lora)." in text
    assert "Reserved: absolute error 2.3% in the mean" in text  # 0.06 % and 4.5 %
    assert table["at best"] == ["10.0", "10.0", "10.0", "10.0"]
    assert "Runtime: at best: at full rates." in text
    assert "Predicted to fit and did not: mp." in text
    assert "Measured alone: ga." in text
    assert "Predicted alone: mp_lora." in text
    assert "ga_mp_lora, measured: why ga_mp_lora is killed" in text
    by_name = {line["combination"]: line for line in lines}
    assert float(by_name["baseline"]["peak_memory_mib.error_percent"]) == pytest.approx(-2.0)
    assert float(by_name["lora"]["runtime_s.error_percent"]) == pytest.approx(-75.0)
    assert by_name["mp"]["fits_measured"] == "False"
    assert by_name["mp"]["peak_memory_mib.measured"] == ""
    assert not list(sweep.glob("plan_check*"))


def test_runtimes_of_another_device_or_other_data_have_no_error(tmp_path: Path) -> None:
    sweep, folder = sweep_and_plan(tmp_path)
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace("h200_141gb", "a100_40gb"))
    shown, lines = checked(sweep, folder)
    assert "Runtimes are of NVIDIA H200 and of a100_40gb, so their errors are left out." in shown
    assert {line["runtime_s.error_percent"] for line in lines} == {""}
    assert lines[0]["peak_memory_mib.error_percent"] != ""
    (folder / "plan.json").write_text(text.replace('"tokens": 14000', '"tokens": 14001'))
    shown, lines = checked(sweep, folder)
    assert "Not the same data: 70.0 tokens a sample in the sweep" in shown
    assert {line["peak_memory_mib.error_percent"] for line in lines} == {""}


def test_runs_that_were_told_otherwise_are_left_out(tmp_path: Path) -> None:
    sweep, folder = sweep_and_plan(tmp_path)
    plan = json.loads((folder / "plan.json").read_text())
    plan["techniques"]["lora"]["rank"] = 8
    plan["rows"][0]["total_params"] = 5_000
    (folder / "plan.json").write_text(json.dumps(plan))
    text, lines = checked(sweep, folder)
    assert "lora.rank is 16 in the sweep, 8 in the plan: lora, ga_mp_lora." in text
    assert "the model has 4,000 parameters in the sweep, 5,000 in the plan: baseline." in text
    assert [line["combination"] for line in lines] == ["mp"]
    plan["model"] = "llama2_7b"
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"plan\.json predicts no run of .*the plan is of llama2_7b on sample"):
        checked(sweep, folder)


@pytest.mark.parametrize(
    ("profile", "device", "is_it"),
    [
        ("rtx4090_24gb", "NVIDIA GeForce RTX 4090", True),
        ("a100_40gb", "NVIDIA A100-SXM4-80GB", True),  # the same rates but for the memory's
        ("a100_40gb", "NVIDIA H200", False),
        ("NVIDIA H200", "NVIDIA H200", True),
        ("t4_16gb", None, False),
    ],
)
def test_a_profiles_name_says_which_device_it_is_of(
    tmp_path: Path, profile: str, device: str | None, is_it: bool
) -> None:
    write(tmp_path, "baseline", device=device, peak_memory_reserved_mib=110.0)
    (group,) = read_groups(tmp_path)
    assert plan_match.is_device(gpu(profile), group) is is_it


def test_runs_belong_to_the_card_of_their_profile_or_their_device(tmp_path: Path) -> None:
    cards = [gpu("a100_40gb"), gpu("h200_141gb"), gpu("cpu", None, "cpu")]
    plan = plan_of([row("baseline", card) for card in cards], *cards)
    for name, values in {"named": {"gpu": "a100_40gb"}, "here": {"gpu": "auto"}, "other": {"device": "T4"}}.items():
        on_cuda = {"device": "NVIDIA H200", "peak_memory_reserved_mib": 110.0}
        write(tmp_path / name, "baseline", **on_cuda | values)
    write(tmp_path / "cpu", "baseline")
    found = {group.variant: plan_match.gpu_of(plan, group) for group in read_groups(tmp_path)}
    names = {name: card and card["name"] for name, card in found.items()}
    assert names == {"cpu": "cpu", "here": "h200_141gb", "named": "a100_40gb", "other": None}


# ------------------------------------------------------------------------------------------------ the command


def reported(*arguments: object) -> int:
    with patch("sys.argv", ["report", *map(str, arguments)]), patch.object(cli, "composed_config") as config:
        config.return_value.tracker.upload = "tracker.upload=true" in arguments
        return report.main()


def test_the_command_tells_plans_from_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, folder = sweep_and_plan(tmp_path)
    for order in ((sweep, folder), (folder, sweep)):
        assert reported(*order) == 0
        assert f"Written: plan_check.md, plan_check.csv in {folder}" in capsys.readouterr().out.replace("\n", "")
    assert reported(folder) == 0
    assert f"Written: {', '.join(SHOWN)} in {folder}" in capsys.readouterr().out
    with pytest.raises(UserError, match="are plans"):
        reported(folder, folder)
    for folders in ((folder,), (sweep, folder)):
        with pytest.raises(UserError, match="one sweep"):
            reported(*folders, "tracker.upload=true")


def test_a_damaged_plan_ends_the_command_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema_version": 1}')
    done = run("llama_ft.report", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'plan.json'} is damaged: command is missing")
    assert len(done.stderr.splitlines()) == 1
