"""A sweep over settings, such as learning rates, as one table: a row for each run, a column for each varied setting."""

from pathlib import Path
from typing import Any

from llama_ft.config.checks import Settings
from llama_ft.config.techniques import combination_label, table_order
from llama_ft.config.training import SEED
from llama_ft.records.result import Result
from llama_ft.reporting.best import held_out_counts
from llama_ft.reporting.ladder import is_ladder, ladder_table
from llama_ft.reporting.results import Group, setting_columns, value_of
from llama_ft.reporting.settings import RECIPE, as_typed, differing, ladder_order, run_settings, varied
from llama_ft.reporting.table import UNKNOWN, Rows, Table
from llama_ft.reporting.table2 import RUNS, Measure, cell, failures, measure_notes, run_counts

BEST = "*"
HELD_OUT = ("eval_loss", "eval_token_accuracy")
HIGHEST = "eval_token_accuracy"  # is best here, in all other columns the lowest
LEARNED = (
    Measure("loss after", "train_loss_after", "{:.3f}".format),
    Measure("held-out loss", "eval_loss", "{:.3f}".format),
)
COLUMNS = (
    Measure("peak MiB", "peak_memory_mib", always=True),
    Measure("reserved MiB", "peak_memory_reserved_mib"),
    Measure("runtime s", "runtime_s", always=True),
    Measure("loss before", "train_loss_before", "{:.3f}".format),
    *LEARNED,
    Measure("token acc.", "eval_token_accuracy", "{:.1%}".format),
)


def gathered(groups: list[Group]) -> list[Group]:
    """The groups as they are shown: those of a sweep as one if it varied more settings than techniques."""
    sweeps: dict[Path, list[Group]] = {}
    for group in groups:
        sweeps.setdefault(group.rows[0].folder.parent, []).append(group)
    shown: list[Group] = []
    for parts in sweeps.values():
        whole = _gathered(parts) if len(parts) > max(len(group.rows) for group in parts) else None
        shown += parts if whole is None else [whole]
    return shown


def _gathered(groups: list[Group]) -> Group | None:
    """One group of all runs, in the order of their settings; None if it is unknown how they differ."""
    runs = [row for group in groups for row in group.rows]
    known = [run_settings(run.folder) for run in runs]
    keys = differing([settings for settings in known if settings])
    keys = [key for key in keys if key != SEED or not any(group.seeds for group in groups)]
    if not keys:
        return None
    values = []
    for run, settings in zip(runs, known, strict=True):  # a run that was refused left no settings
        named = dict(part.partition("=")[::2] for part in run.folder.name.split(",") if "=" in part)
        values.append({key: settings.get(key) if settings else named.get(key, UNKNOWN) for key in keys})
    shown = varied(values)
    order = sorted(range(len(runs)), key=lambda n: _place(runs[n].result, {key: values[n][key] for key in shown}))
    rows, values = [runs[n] for n in order], [values[n] for n in order]
    columns, labels = setting_columns(rows, values), {combination_label(row.result.optim) for row in rows}
    return Group("" if len(labels) > 1 else labels.pop(), rows, columns, values)


def _place(result: Result, shown: Settings) -> tuple[Any, ...]:
    """Sort key: recipes as in the ladder, then the table's order of techniques, then settings."""
    recipe, order = shown.get(RECIPE), ladder_order()
    rung = order.index(recipe) if recipe in order else len(order)
    return rung, table_order(result.optim), *map(_order, shown.values())


def _order(value: Any) -> tuple[bool, float, str]:
    """Sort key: numbers by size, even those in a folder's name, before texts."""
    try:
        return False, float(value), ""
    except (TypeError, ValueError):
        return True, 0.0, as_typed(value)


def run_table(group: Group) -> Table:
    """The table of a gathered group: the ladder of recipes, else with the best of each column marked."""
    if is_ladder(group):
        notes = [*measure_notes(group), *failures(group, group.labels)]
        return ladder_table(group, group.results, LEARNED, notes)
    measures = [m for m in COLUMNS if m.always or any(value_of(r, m.key) is not None for r in group.results)]
    columns = {measure.title: _column(group, measure) for measure in measures}
    counts = run_counts(group.results)
    columns |= {RUNS.lower(): counts} if counts else {}
    has_accuracy = any(measure.key == HIGHEST for measure in measures)
    best = f"{BEST}: the lowest in its column{', for accuracy the highest' if has_accuracy else ''}."
    return setting_rows(group, columns, [best, *measure_notes(group), *failures(group, group.labels)])


def setting_rows(group: Group, columns: dict[str, list[str]], notes: list[str], title: str = "") -> Table:
    """A row for each run, measured or planned: its settings, and its cells in these columns."""
    first, *others = group.settings[0]
    rows: Rows = [
        (settings[first], [*(settings[key] for key in others), *(cells[n] for cells in columns.values())])
        for n, settings in enumerate(group.settings)
    ]
    head, short = [*others, *columns], [key.rpartition(".")[2] for key in others]
    narrow = [(first, [*short, *columns])] if len(set(short)) == len(short) else None
    return Table(title or group.title, [(first, head)], rows, notes, len(head), gap=2, narrow_head=narrow)


def _column(group: Group, measure: Measure) -> list[str]:
    values = [value_of(result, measure.key) if result.status == "ok" else None for result in group.results]
    known = {value for value in values if value is not None and value == value}
    find = max if measure.key == HIGHEST else min
    is_comparable = measure.key not in HELD_OUT or len(held_out_counts(group)) <= 1
    best = find(known) if len(known) > 1 and measure.key != "train_loss_before" and is_comparable else None
    cells = [cell(result, measure.key, measure.form) for result in group.results]
    shown = {text for text, value in zip(cells, values, strict=True) if best is not None and value == best}
    return [f"{BEST if text in shown else ''}{text}" for text in cells]
