"""How a plan is shown, alone and beside a sweep, on plans made by hand."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from helpers.reports import EIGHT, EVIL, Page, csv_rows, failed, gpu, plan_of, row, tables, undrawn, write
from PIL import Image
from rich.console import Console

from llama_ft import cli, report
from llama_ft.config import UserError
from llama_ft.records import CATEGORIES, read_record, write_record
from llama_ft.records.plan import PLAN_FILE, Advice, Plan, PlannedTime, Table1, Table1Cell, Table1Row
from llama_ft.reporting import matching
from llama_ft.reporting.comparison_report import FILES, report_comparison
from llama_ft.reporting.reading import read_groups
from llama_ft.reporting.reports import PLAN_FILES, PLAN_REPORT, print_plan, report_plan, write_plan

A100 = gpu("a100_40gb")


def one_card() -> Plan:
    """The eight on one card, of which the baseline and ga are too large; its lora fails."""
    sizes = dict.fromkeys(EIGHT, 20_000.0) | {"baseline": 80_000.0, "ga": 102_846.5, "mp_lora": 39_725.0}
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
    assert sorted(file.name for file in written.iterdir()) == sorted(PLAN_FILES)
    with Image.open(written / "plan.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 20
    assert read_record(Plan, written / PLAN_FILE) == one_card()


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


@pytest.mark.parametrize(
    "words",
    [
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
    ],
)
def test_notes_say_what_the_numbers_are(written: Path, words: str) -> None:
    assert words in (written / "plan.md").read_text()


def test_packing_is_said_in_the_place_of_micro_batches(tmp_path: Path) -> None:
    plan = one_card()
    packed = replace(plan, training=plan.training | {"packing": 2048})
    text = " ".join(printed(packed, 200).split())
    assert "GA: an update every 8 samples instead of every 1." in text
    assert "The samples of an update are put end to end, up to 2,048 tokens (training.packing)." in text
    write_plan(packed, tmp_path)
    assert "packing=2048" in (tmp_path / "plan.html").read_text()


def test_a_plan_with_compiled_layers_says_that_it_is_of_others() -> None:
    compiled = replace(one_card(), training=one_card().training | {"compile": True})
    assert "training.compile is not modeled" in " ".join(printed(compiled, 200).split())
    assert "training.compile" not in printed(one_card(), 200)


def test_a_plan_says_that_its_optimizer_is_not_adamw() -> None:
    with_sgd = replace(one_card(), training=one_card().training | {"optimizer": "sgd", "momentum": 0.9})
    assert "The optimizer is SGD with momentum 0.9." in printed(with_sgd, 200)
    assert "optimizer is" not in printed(one_card(), 200)
    settings = {"optimizer": "paged_adamw_8bit", "optimizer_in_backward": True}
    with_8_bits = replace(one_card(), training=one_card().training | settings)
    with_8_bits.rows[0].managed_mib = 12_852.4
    said = printed(with_8_bits, 250)
    assert "The optimizer is AdamW with moments in 8 bits." in said
    assert "Up to 12,852 MiB of optimizer state are in managed memory" in said
    assert "Each weight is updated within the backward pass" in said


def test_csv_holds_every_number_unrounded(written: Path) -> None:
    lines = csv_rows(written / "plan.csv")
    assert [line["combination"] for line in lines] == EIGHT
    for line, planned in zip(lines, map(asdict, one_card().rows), strict=True):
        for key in "peak_memory_mib reserved_mib required_mib margin_mib runtime_s fits error gpu".split():
            assert line[key] == ("" if planned[key] is None else str(planned[key]))
        for part in ("memory_mib", "memory_max_mib", "flops", "bound_s"):
            for name, value in (planned[part] or {}).items():
                assert float(line[f"{part}.{name}"]) == value


def test_the_page_needs_nothing_else_and_holds_every_cell(written: Path) -> None:
    text = (written / "plan.html").read_text()
    page = Page(text)
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
    cells = dict.fromkeys((*CATEGORIES[:4], "computation"), Table1Cell("↑", 1.0, 2.0, EVIL))
    rows = [row("baseline", card), failed("lora", card, EVIL)]
    values = {"model": EVIL, "command": EVIL, "versions": {EVIL: EVIL}, "advice": Advice("fit", EVIL, lines=[EVIL])}
    plan = plan_of(rows, card, table1=Table1(EVIL, [Table1Row("ga", "GA", EVIL, cells)], []), **values)
    write_plan(replace(plan, data=replace(plan.data, name=EVIL, about=EVIL)), tmp_path)
    assert Page((tmp_path / "plan.html").read_text()).text.count(EVIL) >= 9


@pytest.mark.parametrize("columns", [30, 60, 80, 140])
def test_a_narrow_terminal_cuts_no_number(columns: int) -> None:
    text = printed(plan_of([row(name, A100, 103_000.0 + n) for n, name in enumerate(EIGHT)], A100), columns)
    assert "…" not in text
    assert all(f"103,00{n}" in text for n in range(8))
    beside = [len(line.split()) for line in text.splitlines() if line.startswith("Peak memory")]
    assert (beside == [3 + 8]) == (columns >= 80)


@pytest.mark.parametrize("card", [gpu("cpu", None, "cpu"), gpu("new", None)])
def test_what_is_not_known_is_a_dash(card: dict[str, Any]) -> None:
    text = printed(plan_of([row("baseline", card, seconds=None), row("lora", card, seconds=None)], card))
    lines = {line[:16].strip(): line[16:].split() for line in text.splitlines() if line}
    assert lines["Fits"] == ["–", "–"]
    assert lines["Runtime, s"] == ["–", "–"]  # no bound is shown, so none is spoken of
    assert ("Needed, MiB" in lines) == (card["name"] == "new")
    assert "Margin, MiB" not in lines
    assert f"Runtime is not known without rates: gpu={card['name']}." in text


def test_calibrated_runtimes_are_no_bound() -> None:
    text = printed(plan_of([row("lora", A100)], A100, time=PlannedTime("calibrated", "at 45 % of the rate")))
    assert "at best" not in text
    assert "Runtime: seconds, at 45 % of the rate." in text


def test_a_terminal_that_lacks_the_letters_has_the_table() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as file:
        print_plan(one_card(), Console(file=file, width=80))
        file.flush()
        text = raw.getvalue().decode("ascii")
    (fits,) = [line for line in text.splitlines() if line.startswith("Fits")]
    assert fits.replace("|", " ").split()[:3] == ["Fits", "x", "error"]


# ------------------------------------------------------------------------------------------------ several cards


def test_several_cards_are_columns_with_their_memory(tmp_path: Path) -> None:
    cards = [gpu("small", 16_000), gpu("large", 81_000), gpu("unknown|", None)]
    rows = [row(name, card, size) for card in cards for name, size in (("baseline", 80_000.0), ("lora", 15_400.0))]
    rows[3] = failed("lora", cards[1], "no bf16")
    write_plan(plan_of(rows, *cards), tmp_path)
    text = (tmp_path / "plan.md").read_text()
    needed, runtime = tables(text.replace(r"\|", "¦"))
    assert needed["GPU"] == ["small", "large", "unknown¦"]
    assert needed["Memory, MiB"] == ["16,000", "81,000", "–"]
    assert needed["baseline"] == ["80,600 ×", "80,600", "80,600"]
    assert needed["LoRA"] == ["16,000", "error", "16,000"]
    assert runtime["baseline"] == ["10.0 ×", "10.0", "10.0"]
    assert "lora on large: no bf16" in text
    assert "runtime, s at best" in text
    alts = list(Page((tmp_path / "plan.html").read_text()).pictures())
    assert alts[:4] == ["memory needed by card", *(f"memory by category, {card['name']}" for card in cards)]
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 1_000


def test_many_cards_on_a_narrow_terminal() -> None:
    cards = [gpu(f"card{n}_{10 + n}gb", 10_000 + n) for n in range(9)]
    text = printed(plan_of([row("baseline", card) for card in cards], *cards), 60)
    assert all(f"card{n}_{10 + n}gb" in text and f"10,00{n}" in text for n in range(9))


# ------------------------------------------------------------------------------------------------ Table 1, advice


def test_table_1_shows_arrows_with_the_numbers_behind_them() -> None:
    cells = {
        "parameter": Table1Cell("↓", 25_736.5, 12_868.25, "MiB"),
        "gradient": Table1Cell("–", 100.0, 100.0, "MiB"),
        "optimizer_state": Table1Cell("↑", 51_473.04, 51_473.11, "MiB"),
        "activation": Table1Cell("↑", 0.0, 32.25, "MiB"),
        "computation": Table1Cell("–", 20.71, 20.71, "TFLOP"),
    }
    table1 = Table1("fp32", [Table1Row("mp", "MP", "frozen weights in 16 bit", cells)], ["Said once."])
    advice = Advice("fit", "a100_40gb", lines=["Fastest: lora."])
    text = printed(plan_of([row("baseline", A100)], A100, table1=table1, advice=advice), 200)
    words = (
        "Needed, MiB",
        "Parameter, MiB",
        "Computation, TFLOP",
        "MP: frozen weights in 16",
        "↓ 25,736 → 12,868",
        "– 100",
        "↑ 51,473.0 → 51,473.1",  # as many decimals as tell them apart
        "↑ 0.00 → 32.2",
        "– 20.7",
        "Baseline: fp32",
        "Said once.",
        "goal=fit, gpu=a100_40gb",
        "Fastest: lora.",
    )
    begins = [text.index(word) for word in words]
    assert begins == sorted(begins)


# ------------------------------------------------------------------------------------------------ reading a plan


def damaged() -> Iterator[tuple[str, str]]:
    """Contents of plan.json, and what is said of them."""
    plan = asdict(one_card())
    yield "{", "not valid JSON"
    yield json.dumps(plan | {"schema_version": 1}), "has schema_version 1, and this version reads 2"
    yield json.dumps(plan | {"model": 3}), "model: "
    yield json.dumps(plan | {"advice": {"goal": "fit"}}), "advice.gpu: "
    yield json.dumps(plan | {"rows": [*plan["rows"][:3], {}]}), "rows[3].optim: "
    yield json.dumps(plan | {"rows": []}), "rows must be one for each run on each of gpus"


@pytest.mark.parametrize(("text", "words"), list(damaged()), ids=["json", "version", "type", "missing", "row", "rows"])
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


@pytest.fixture
def sweep_and_plan(tmp_path: Path) -> tuple[Path, Path]:
    """Measured on an H200: 2 % less and 4 % more than predicted; runtimes twice and four times the bound."""
    sweep, folder, card = tmp_path / "sweep", tmp_path / "plan", gpu("h200_141gb", 95_000)
    for name, (size, reserved, seconds) in {
        "baseline": (102_000.0, 100_000.0, 20.0),
        "lora": (20_000.0, 20_000.0, 40.0),
        "ga": (102_000.0, 100_000.0, 20.0),
    }.items():
        measured = {"peak_memory_mib": size, "peak_memory_reserved_mib": reserved, "runtime_s": seconds}
        write(sweep, name, device="NVIDIA H200", **measured)
    write(sweep, "mp", "oom", device="NVIDIA H200")
    write(sweep, "ga_mp_lora", "killed", device="NVIDIA H200")
    planned = {"baseline": 99_960.0, "lora": 20_800.0, "mp": 90_000.0, "ga_mp_lora": 9_000.0, "mp_lora": 9_000.0}
    folder.mkdir()
    write_record(plan_of([row(name, card, size) for name, size in planned.items()], card), folder / PLAN_FILE)
    return sweep, folder


def change_plan(folder: Path, old: str, new: str) -> None:
    text = (folder / "plan.json").read_text()
    assert old in text
    (folder / "plan.json").write_text(text.replace(old, new))


def checked(sweep: Path, folder: Path) -> tuple[str, dict[str, dict[str, str]]]:
    """What is in comparison.md, and in comparison.csv by combination."""
    with undrawn():
        report_comparison(sweep, folder, Console(file=io.StringIO(), width=200))
    lines = {line["combination"]: line for line in csv_rows(folder / "comparison.csv")}
    return (folder / "comparison.md").read_text(), lines


def test_prediction_beside_measurement_with_the_signed_error(sweep_and_plan: tuple[Path, Path]) -> None:
    sweep, folder = sweep_and_plan
    text, lines = checked(sweep, folder)
    (table,) = tables(text)
    assert table["Peak memory, MiB measured"] == ["102,000", "20,000", "×", "killed"]
    assert table["Peak memory, MiB predicted"] == ["99,960 ×", "20,800", "90,000", "9,000"]  # × does not fit
    assert table["Peak memory, MiB error"] == ["-2.0%", "+4.0%", "–", "–"]
    assert table["Runtime, s at best"] == ["10.0 ×", "10.0", "10.0", "10.0"]
    for words in (
        "Peak memory: absolute error, mean 3.0%, median 3.0%; worst +4.0% (lora).",
        "Runtime: absolute error, mean 62.5%, median 62.5%; worst -75.0% (lora).",
        "Reserved: absolute error, mean 2.3%",  # 0.06 % and 4.5 %
        "Runtime: at best: at full rates.",
        "Predicted to fit and did not: mp.",
        "Predicted not to fit and did: baseline.",
        "Only measured: ga.",
        "Only predicted: mp_lora.",
        "ga_mp_lora, measured: why ga_mp_lora is killed",
        "- gpu.name: auto in the sweep, h200_141gb in the plan",
    ):
        assert words in text, words
    assert float(lines["baseline"]["peak_memory_mib.error"]) == pytest.approx(-0.02)
    assert float(lines["lora"]["runtime_s.error"]) == pytest.approx(-0.75)
    assert (lines["mp"]["status.measured"], lines["mp"]["status.predicted"]) == ("oom", "ok")
    assert (lines["mp"]["peak_memory_mib.measured"], lines["mp"]["peak_memory_mib.predicted"]) == ("", "90000.0")
    assert ["measured", "102,000", "20,000", "×", "killed"] in Page((folder / "comparison.html").read_text()).rows
    assert not list(sweep.glob("comparison*"))


def test_runtimes_of_another_device_or_other_data_have_no_error(sweep_and_plan: tuple[Path, Path]) -> None:
    sweep, folder = sweep_and_plan
    change_plan(folder, "h200_141gb", "a100_40gb")
    shown, lines = checked(sweep, folder)
    assert "Runtimes are of NVIDIA H200 and of a100_40gb, so their errors are left out." in shown
    assert {line["runtime_s.error"] for line in lines.values()} == {""}
    assert lines["baseline"]["peak_memory_mib.error"] != ""
    change_plan(folder, '"tokens": 14000', '"tokens": 14001')
    shown, lines = checked(sweep, folder)
    assert "Not the same data: 70.0 tokens a sample in the sweep" in shown
    assert {line["peak_memory_mib.error"] for line in lines.values()} == {""}


def test_runs_that_were_told_otherwise_are_left_out(sweep_and_plan: tuple[Path, Path]) -> None:
    sweep, folder = sweep_and_plan
    change_plan(folder, '"rank": 16', '"rank": 8')
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace('"total_params": 4000', '"total_params": 5000', 1))  # of baseline
    text, lines = checked(sweep, folder)
    assert "lora.rank is 16 in the sweep, 8 in the plan: lora, ga_mp_lora." in text
    assert "- lora.rank: 16 in the sweep, 8 in the plan" in text
    assert "the model has 4,000 parameters in the sweep, 5,000 in the plan: baseline." in text
    assert list(lines) == ["mp"]
    change_plan(folder, '"model": "tiny"', '"model": "llama2_7b"')
    with pytest.raises(UserError, match=r"plan\.json predicts no run of .*the plan is for llama2_7b on sample"):
        checked(sweep, folder)


def test_runs_with_another_optimizer_are_left_out(sweep_and_plan: tuple[Path, Path]) -> None:
    sweep, folder = sweep_and_plan
    (sweep / "mp" / "config.yaml").write_text("training: {optimizer: adamw}")
    change_plan(folder, '"training": {', '"training": {"optimizer": "sgd", ')
    with pytest.raises(UserError, match=r"training\.optimizer is adamw in the sweep, sgd in the plan: .*mp"):
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
    assert matching.is_device(gpu(profile), group) is is_it


def test_runs_belong_to_the_card_of_their_profile_or_their_device(tmp_path: Path) -> None:
    cards = [A100, gpu("h200_141gb"), gpu("cpu", None, "cpu")]
    plan = plan_of([row("baseline", card) for card in cards], *cards)
    for name, values in {"named": {"gpu": "a100_40gb"}, "here": {"gpu": "auto"}, "other": {"device": "T4"}}.items():
        on_cuda = {"device": "NVIDIA H200", "peak_memory_reserved_mib": 110.0}
        write(tmp_path / name, "baseline", **on_cuda | values)
    write(tmp_path / "cpu", "baseline")
    cards_of = {group.variant: matching.card_of(plan, group) for group in read_groups(tmp_path)}
    names = {name: card and card["name"] for name, card in cards_of.items()}
    assert names == {"cpu": "cpu", "here": "h200_141gb", "named": "a100_40gb", "other": None}


# ------------------------------------------------------------------------------------------------ the command


def reported(*arguments: object) -> int:
    with patch("sys.argv", ["report", *map(str, arguments)]), patch.object(cli, "composed_config") as config:
        config.return_value.tracker.upload = "tracker.upload=true" in arguments
        config.return_value.tracker.dashboard = False
        return report.main()


def test_the_command_tells_plans_from_sweeps(
    sweep_and_plan: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, folder = sweep_and_plan
    for order in ((sweep, folder), (folder, sweep)):
        assert reported(*order) == 0
        written = f"Written: {', '.join(FILES)} in {folder}"
        assert written in capsys.readouterr().out.replace("\n", "")
    assert reported(sweep, sweep) == 0
    assert f"Written: {', '.join(FILES)} in {sweep}" in capsys.readouterr().out.replace("\n", "")
    assert reported(folder) == 0
    assert f"Written: {', '.join(PLAN_REPORT)} in {folder}" in capsys.readouterr().out
    with pytest.raises(UserError, match="are plans"):
        reported(folder, folder)
    for folders in ((folder,), (sweep, folder)):
        with pytest.raises(UserError, match="one sweep"):
            reported(*folders, "tracker.upload=true")
