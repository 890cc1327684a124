"""Recipes, and the ladder of them that `experiment=less_memory` measures and plans."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT, Sweep, run, run_sweep
from helpers.reports import csv_rows, failed, gpu, plan_of, row, tables, write_varied
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from llama_ft import cli, plan
from llama_ft.config import TrainConfig
from llama_ft.records.plan import Plan
from llama_ft.reporting.ladder import base_of, changes
from llama_ft.reporting.reports import print_plan, report_sweep, write_plan
from llama_ft.reporting.results import planned_group
from llama_ft.reporting.settings import ladder_order

A100 = gpu("a100_40gb")
RECIPES = sorted(file.stem for file in (CHECKOUT / "conf" / "recipe").glob("*.yaml"))
IN_BACKWARD = ["training.optimizer_in_backward=true", "training.max_grad_norm=inf"]
FULL_8BIT = ["optim=mp", "mp.dtype=bf16", "mp.trainable_weights=compute", "training.optimizer=adamw_8bit"]
QLORA = ["optim=mp_lora", "mp.frozen_weights=nf4"]
TYPED = {  # what each recipe stands for
    "full": ["optim=baseline"],
    "full_mp": ["optim=mp"],
    "full_bf16": FULL_8BIT[:3],
    "full_8bit": FULL_8BIT,
    "full_8bit_in_backward": [*FULL_8BIT, *IN_BACKWARD],
    "full_8bit_in_backward_gc": [*FULL_8BIT, *IN_BACKWARD, "optim.gc=true"],
    "lora": ["optim=lora"],
    "lora_mp": ["optim=mp_lora"],
    "qlora": QLORA,
    "qlora_8bit": [*QLORA, "training.optimizer=adamw_8bit"],
    "qlora_8bit_gc": [*QLORA, "training.optimizer=adamw_8bit", "optim.gc=true"],
    "qlora_8bit_gc_offload": [*QLORA, "training.optimizer=adamw_8bit", "optim.gc=true", "gc.offload=cpu"],
}


def composed(*arguments: str) -> TrainConfig:
    return cli.composed_config("train", list(arguments), TrainConfig)


# ------------------------------------------------------------------------------------------------------------ recipes


def test_the_ladder_has_every_recipe() -> None:
    assert sorted(ladder_order()) == RECIPES
    assert list(TYPED) == ladder_order()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_name_for_what_one_can_type(recipe: str) -> None:
    named, typed = composed(f"recipe={recipe}"), composed(*TYPED[recipe])
    assert named.hash() == typed.hash()
    assert replace(named, recipe=None) == typed
    assert named.recipe == recipe


@pytest.mark.parametrize(
    ("typed", "holds"),
    [
        ("mp.frozen_weights=fp32", lambda config: config.mp.frozen_weights.name == "fp32"),
        ("optim=lora", lambda config: config.optim.combination == "lora_gc"),
        ("optim.gc=false", lambda config: config.optim.combination == "mp_lora"),
        ("lora.rank=64", lambda config: config.lora.rank == 64 and config.mp.frozen_weights.name == "nf4"),
    ],
)
def test_what_is_typed_counts_more_than_the_recipe(typed: str, holds: Any) -> None:
    for arguments in (("recipe=qlora_8bit_gc", typed), (typed, "recipe=qlora_8bit_gc")):
        assert holds(composed(*arguments))


# ------------------------------------------------------------------------------------------------------------- a table

# Peaks of rungs, and seconds.
NUMBERS = {
    "full": (100_000.0, 80.0),
    "full_mp": (100_000.0, 48.0),
    "full_bf16": (50_000.0, 24.0),
    "full_8bit": (32_000.0, 25.0),
    "lora": (25_000.0, 30.0),
    "lora_mp": (15_000.0, 6.0),
    "qlora": (6_000.0, 9.0),
    "qlora_8bit": (5_990.0, 9.0),
}
TABLE = {  # the peak of above and of first, and the runtime
    "full": "– 1.00 – 1.00",
    "full_mp: +MP": "1.00 1.00 0.60 0.60",
    "full_bf16: mp.dtype=bf16, mp.trainable_weights=compute": "0.50 0.50 0.50 0.30",
    "full_8bit: training.optimizer=adamw_8bit": "0.64 0.32 1.04 0.31",
    "lora: +LoRA": "0.25 0.25 0.38 0.38",  # of full, from which it differs in one thing
    "lora_mp: +MP": "0.60 0.15 0.20 0.07",
    "qlora: mp.frozen_weights=nf4": "0.40 0.06 1.50 0.11",
    "qlora_8bit: training.optimizer=adamw_8bit": "1.00 0.06 1.00 0.11",
}
INTERACTIONS = (
    "+MP: +0.00 MiB on full, -10,000 MiB on lora.",
    "training.optimizer=adamw_8bit: -18,000 MiB on full_bf16, -10.0 MiB on qlora.",
)


def settings_of(recipe: str) -> dict[str, Any]:
    config = composed(f"recipe={recipe}").to_dict()
    return {key: config[key] for key in ("optim", "mp", "gc", "lora", "ga", "training", "recipe")}


def ladder_plan() -> Plan:
    keys = {"mp": ("dtype", "trainable_weights", "frozen_weights"), "training": ("optimizer",)}
    rows = []
    for recipe, (peak, seconds) in NUMBERS.items():
        config = settings_of(recipe)
        name = "_".join(each for each, on in config["optim"].items() if on) or "baseline"
        own = {"recipe": recipe} | {f"{part}.{key}": config[part][key] for part in keys for key in keys[part]}
        rows.append(replace(row(name, A100, peak, seconds), settings=own))
    return plan_of(rows, A100)


def cells(markdown: str) -> dict[str, str]:
    """The ladder's ratios by rung."""
    (table,) = tables(markdown)
    head = next(iter(table.values()))
    ratios = [number for number, name in enumerate(head) if "×" in name]
    return {name: " ".join(line[number] for number in ratios) for name, line in list(table.items())[2:]}


def test_a_planned_ladder_has_the_ratios_of_its_numbers(tmp_path: Path) -> None:
    write_plan(ladder_plan(), tmp_path)
    text = (tmp_path / "plan.md").read_text()
    assert cells(text) == TABLE
    for words in INTERACTIONS:
        assert words in text
    assert re.search(r"\| lora_mp: \+MP \| 15,000 \|.*\| 15,600 \| yes \|$", text, re.MULTILINE)
    assert re.search(r"\| full_8bit: .* \| 32,600 \| yes \|$", text, re.MULTILINE)
    assert re.search(r"\| full: ?.*|\| full \| 100,000 .* ×", text)
    assert [line["recipe"] for line in csv_rows(tmp_path / "plan.csv")] == list(NUMBERS)
    with Image.open(tmp_path / "plan.png") as image:
        assert image.height > 600


@pytest.mark.parametrize("width", [100, 200])
def test_a_terminal_shows_each_rung_in_one_table(width: int) -> None:
    out = io.StringIO()
    print_plan(ladder_plan(), Console(file=out, width=width, force_terminal=True, no_color=True))
    table = out.getvalue().split("×above:")[0]
    assert table.count("MiB×above") == 1
    assert max(map(len, table.splitlines())) <= width


def test_a_measured_ladder_is_the_same_table_in_the_order_of_the_ladder(tmp_path: Path) -> None:
    for recipe, (peak, seconds) in NUMBERS.items():
        config = settings_of(recipe)
        name = "_".join(each for each, on in config["optim"].items() if on) or "baseline"
        write_varied(tmp_path, f"{name},recipe={recipe}", config, peak_memory_mib=peak, runtime_s=seconds)
    refused = {"status": "error", "config_hash": None, "error": "no bitsandbytes"}
    write_varied(tmp_path, "mp_lora_gc,recipe=qlora_8bit_gc", None, **refused)
    out = io.StringIO()
    report_sweep(tmp_path, Console(file=out, width=100))
    text = (tmp_path / "table2.md").read_text()
    assert cells(text) == TABLE | {"qlora_8bit_gc": "– – – –"}
    for words in (*INTERACTIONS, "qlora_8bit_gc: no bitsandbytes"):
        assert words in text
    assert [line["recipe"] for line in csv_rows(tmp_path / "table2.csv")] == [*NUMBERS, "qlora_8bit_gc"]


def test_a_rung_is_compared_with_the_row_that_differs_least() -> None:
    made = ladder_plan()
    group = planned_group(made, A100)
    names = list(NUMBERS)
    bases = {name: None if (base := base_of(group, n)) is None else names[base] for n, name in enumerate(names)}
    assert bases == {
        **{"full": None, "full_mp": "full", "full_bf16": "full_mp", "full_8bit": "full_bf16", "lora": "full"},
        **{"lora_mp": "lora", "qlora": "lora_mp", "qlora_8bit": "qlora"},
    }
    assert changes(group, 4, 5) == ["-MP"]


def test_a_rung_that_cannot_run_has_no_ratio(tmp_path: Path) -> None:
    made = ladder_plan()
    made.rows[2] = replace(failed("mp", A100, "no bf16 here"), settings=made.rows[2].settings)
    write_plan(made, tmp_path)
    text = (tmp_path / "plan.md").read_text()
    shown = cells(text)
    assert shown["full_bf16: mp.dtype=bf16, mp.trainable_weights=compute"] == "– – – –"
    assert shown["full_8bit: training.optimizer=adamw_8bit"].split()[0::2] == ["–", "–"]
    assert "full_bf16: no bf16 here" in text


def test_recipes_beside_other_settings_are_a_table_of_settings(tmp_path: Path) -> None:
    rows = [
        replace(row(name, A100, 100.0 * rank), settings={"recipe": name, "lora.rank": rank})
        for name in ("lora", "mp_lora")
        for rank in (4, 8)
    ]
    write_plan(plan_of(rows, A100), tmp_path)
    (table,) = tables((tmp_path / "plan.md").read_text())
    assert next(iter(table.items())) == ("recipe", ["lora.rank", "peak MiB", "needed", "fits", "margin", "runtime s"])


# -------------------------------------------------------------------------------------------------- real commands

WORKING = "recipe=full,full_mp,full_bf16,lora,lora_mp"  # in another order than the folders'
FAST = ("data.first=4", "tracker=disabled")


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    cwd = tmp_path_factory.mktemp("ladder")
    return run_sweep(cwd, "experiment=less_memory", WORKING, *FAST, folder=cwd / "outputs" / "less_memory")


@pytest.mark.process
def test_a_small_ladder_is_measured(ladder: Sweep) -> None:
    assert ladder.process.returncode == 0, ladder.process.stdout + ladder.process.stderr
    assert set(ladder.results()) == {
        *("baseline,recipe=full", "mp,recipe=full_mp", "mp,recipe=full_bf16", "lora,recipe=lora"),
        "mp_lora,recipe=lora_mp",
    }
    assert {result["status"] for result in ladder.results().values()} == {"ok"}
    lines = csv_rows(ladder.folder / "table2.csv")
    assert [line["recipe"] for line in lines] == WORKING.removeprefix("recipe=").split(",")
    peaks = [float(line["peak_memory_mib"]) for line in lines]
    shown = cells((ladder.folder / "table2.md").read_text())
    assert [line.split()[1] for line in shown.values()] == [f"{peak / peaks[0]:.2f}" for peak in peaks]
    config = OmegaConf.load(ladder.folder / "lora,recipe=lora" / "config.yaml")
    assert config.recipe == "lora"
    assert not list(ladder.folder.glob("*/*.safetensors"))  # it measures, and keeps no weights


@pytest.mark.process
def test_its_plan_is_the_measurement_to_the_byte(ladder: Sweep) -> None:
    """The same arguments, and `report` with both: rung by rung."""
    cwd = ladder.folder.parent
    runs = plan.planned_runs(["experiment=less_memory", WORKING, *FAST, "gpu=cpu"])
    assert [each.recipe for each in runs] == WORKING.removeprefix("recipe=").split(",")
    made = run("llama_ft.plan", "experiment=less_memory", WORKING, *FAST, "gpu=cpu", "output=plan", cwd=cwd)
    assert made.returncode == 0, made.stderr
    compared = run("llama_ft.report", str(ladder.folder), "plan", cwd=cwd)
    assert compared.returncode == 0, compared.stderr
    lines = csv_rows(cwd / "plan" / "comparison.csv")
    assert [line["variant"] for line in lines] == WORKING.removeprefix("recipe=").split(",")
    assert [line["peak_memory_mib.error"] for line in lines] == ["0.0"] * 5
    assert "absolute error, mean 0.0%" in (cwd / "plan" / "comparison.md").read_text()


@pytest.mark.process
@pytest.mark.slow
def test_the_whole_ladder_is_measured_and_planned(tmp_path: Path) -> None:
    sweep = run_sweep(tmp_path, "experiment=less_memory", *FAST, folder=tmp_path / "outputs" / "less_memory")
    assert sweep.process.returncode == 0, sweep.process.stdout + sweep.process.stderr
    assert [line["recipe"] for line in csv_rows(sweep.folder / "table2.csv")] == ladder_order()
    made = run("llama_ft.plan", "experiment=less_memory", *FAST, "gpu=cpu", "output=plan", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    run("llama_ft.report", str(sweep.folder), "plan", cwd=tmp_path)
    lines = csv_rows(tmp_path / "plan" / "comparison.csv")
    assert [line["variant"] for line in lines] == ladder_order()
    assert {line["peak_memory_mib.error"] for line in lines} == {"0.0"}
