"""The tables of a plan: Table 2 predicted, for one card or for several; Table 1 computed; all numbers as CSV."""

import csv
import io
from collections.abc import Callable
from typing import Any

from llama_ft.records import CATEGORIES
from llama_ft.reporting.plan_file import TABLE1_COLUMNS, Plan, Rows, baseline_of, rows_on
from llama_ft.reporting.plan_notes import all_notes, short_instant, time_notes
from llama_ft.reporting.results import COURSE, LABELS, TECHNIQUES, label
from llama_ft.reporting.table2 import MARKS, Table, amount

ERROR, UNKNOWN, TOO_LARGE = MARKS["error"], "–", MARKS["oom"]
MAX_CHOICE_LENGTH = 28


def tables_of(plan: Plan) -> list[Table]:
    """All tables, in the order in which they are shown."""
    gpus = plan["gpus"]
    found = [card_table(plan, gpus[0])] if len(gpus) == 1 else [needed_table(plan), runtime_table(plan)]
    return found + ([table1(plan["table1"])] if plan["table1"] else [])


def title(plan: Plan, of: str) -> str:
    """What a plan is of, as the measured table's title says it."""
    data = plan["data"]
    return f"{plan['model']} · {data['name']}, {data['samples']} samples · {of} · predicted"


def card_table(plan: Plan, gpu: dict[str, Any]) -> Table:
    """Table 2 of a card: a column for each combination."""
    plan_rows = rows_on(plan, gpu["name"])
    base = baseline_of(plan_rows)
    shown = [name for name in TECHNIQUES if name in COURSE or any(row["optim"][name] for row in plan_rows)]
    techniques = [(LABELS[name], ["ON" if row["optim"][name] else "OFF" for row in plan_rows]) for name in shown]
    rows: list[tuple[str, list[str]]] = []

    def add(text: str, key: str, form: Callable[[Any], str] = amount, always: bool = False) -> None:
        if always or any(row[key] is not None for row in plan_rows):
            rows.append((text, [_cell(row, key, form) for row in plan_rows]))

    def add_relative(key: str) -> None:
        of = base[key] if base else None
        if any(row[key] is not None for row in plan_rows):
            rows.append(
                ("  of baseline", [_cell(row, key, lambda v: f"{v / of:.0%}" if of else "–") for row in plan_rows])
            )

    add("Peak memory, MiB", "peak_memory_mib", always=True)
    add_relative("peak_memory_mib")
    add("  during", "phase", short_instant)
    add("Reserved, MiB", "reserved_mib")
    add("Needed, MiB", "required_mib")
    add("Fits", "fits", fits_mark, always=True)
    add("Margin, MiB", "margin_mib", signed)
    add(runtime_name(plan, plan_rows), "runtime_s", always=True)
    add_relative("runtime_s")
    add("Tokens/s", "tokens_per_s")
    add("Bound by", "binds", str)
    return Table(title(plan, gpu["name"]), techniques, rows, all_notes(plan, [gpu], plan_rows))


def _cell(row: dict[str, Any], key: str, form: Callable[[Any], str]) -> str:
    if row["error"]:
        return ERROR
    return UNKNOWN if row[key] is None else form(row[key])


def fits_mark(fits: bool) -> str:
    """`yes`, or the mark of a run that is out of memory."""
    return "yes" if fits else TOO_LARGE


def signed(value: float) -> str:
    """An amount that may be negative."""
    return f"-{amount(-value)}" if value < 0 else amount(value)


def runtime_name(plan: Plan, rows: Rows) -> str:
    """The name of the row of runtimes: whether they are a bound."""
    is_bound = plan["time"]["kind"] == "bound" and any(row["runtime_s"] is not None for row in rows)
    return "Runtime, at best" if is_bound else "Runtime, s"


def needed_table(plan: Plan) -> Table:
    """What each combination needs on each card, marked where that is more than the card has."""
    return _cards_table(
        plan, "MiB needed", "required_mib", all_notes(plan, plan["gpus"], plan["rows"], with_times=False)
    )


def runtime_table(plan: Plan) -> Table:
    """How long each combination takes on each card, marked where it does not fit."""
    rows = plan["rows"]
    about = "s at best" if plan["time"]["kind"] == "bound" else "s"
    notes = ["×: needs more memory than the card has."] if any(row["fits"] is False for row in rows) else []
    return _cards_table(plan, f"runtime, {about}", "runtime_s", notes + time_notes(plan, rows))


def _cards_table(plan: Plan, what: str, key: str, notes: list[str]) -> Table:
    gpus = plan["gpus"]
    columns = [rows_on(plan, gpu["name"]) for gpu in gpus]
    heading = [
        ("GPU", [_escaped(gpu["name"]) for gpu in gpus]),
        ("Memory, MiB", [amount(gpu["memory_mib"]) if gpu["memory_mib"] else UNKNOWN for gpu in gpus]),
    ]
    rows = [
        (
            label(alike[0]),
            [_cell(row, key, amount) + (f" {TOO_LARGE}" if row["fits"] is False else "") for row in alike],
        )
        for alike in zip(*columns, strict=True)
    ]
    return Table(f"{title(plan, f'{len(gpus)} GPUs')}: {what}", heading, rows, notes, most_columns=len(gpus))


def table1(found: dict[str, Any]) -> Table:
    """Table 1: how much each technique adds to, or takes from, each part of memory and the computation."""
    units = {name: _unit(found["rows"], name) for name in TABLE1_COLUMNS}
    heading = [name.replace("_", " ").capitalize() + (f", {unit}" if unit else "") for name, unit in units.items()]
    rows = []
    for row in found["rows"]:
        cells = [_change(row["cells"][name], with_unit=unit is None) for name, unit in units.items()]
        rows.append((_escaped(f"{row['name']}: {row['choice']}" if row["choice"] else row["name"]), cells))
    notes = [f"Baseline: {found['baseline']}", *found["notes"]]
    name = "What each technique changes, computed"
    return Table(name, [("", heading)], rows, notes, longest_name=MAX_CHOICE_LENGTH, gap=3)


def _unit(rows: Rows, column: str) -> str | None:
    """The unit of all cells of a column, if they have one in common."""
    units = {row["cells"][column]["unit"] for row in rows}
    return units.pop() if len(units) == 1 else None


def _change(cell: dict[str, Any], with_unit: bool) -> str:
    """The arrow with the numbers behind it, of as many decimals as tell them apart."""
    before, after, unit = cell["before"], cell["after"], f" {cell['unit']}" if with_unit else ""
    if before == after:
        return f"{cell['arrow']} {amount(before)}{unit}"
    forms: list[Callable[[float], str]] = [amount, *(f"{{:,.{n}f}}".format for n in (1, 2, 3))]
    form = next((form for form in forms if form(before) != form(after)), "{:,.6g}".format)
    return f"{cell['arrow']} {form(before)} → {form(after)}{unit}"


def advice_title(advice: dict[str, Any]) -> str:
    """What was asked for."""
    return f"goal={advice['goal']}" + (f", gpu={advice['gpu']}" if advice["gpu"] else "")


def _escaped(text: str) -> str:
    """A text as a cell of Markdown."""
    return text.replace("|", r"\|")


def csv_text(plan: Plan) -> str:
    """For `plan.csv`: a row for each combination on each card, numbers unrounded."""
    plain = (
        "gpu error peak_memory_mib instant reserved_mib context_mib required_mib total_memory_mib fits margin_mib"
        " runtime_s tokens_per_s binds trainable_params total_params steps samples tokens bytes_moved"
    ).split()
    rows = plan["rows"]
    parts = {"memory_mib": list(CATEGORIES), "memory_max_mib": list(CATEGORIES)}
    for part in ("flops", "bound_s"):
        parts[part] = list(dict.fromkeys(name for row in rows for name in row[part] or {}))
    columns = [
        "combination",
        *TECHNIQUES,
        *plain,
        *(f"{part}.{name}" for part, names in parts.items() for name in names),
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "data", *columns])
    for row in rows:
        values = [(row[part] or {}).get(name) for part, names in parts.items() for name in names]
        known = [row["combination"], *(row["optim"][name] for name in TECHNIQUES), *(row[key] for key in plain)]
        writer.writerow([plan["model"], plan["data"]["name"], *known, *values])
    return out.getvalue()
