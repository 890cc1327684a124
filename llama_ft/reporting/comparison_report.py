"""The report of a comparison: printed, and as Markdown, numbers, a picture and a page in the second folder."""

from pathlib import Path
from typing import Any

from rich.console import Console

from llama_ft.config import UserError
from llama_ft.config.techniques import combination_label
from llama_ft.files import check_replaceable, explained, write_text
from llama_ft.records import read_record
from llama_ft.records.metrics import read_metrics
from llama_ft.records.plan import PLAN_FILE, Plan, is_plan
from llama_ft.reporting.comparison import COMPARED, SWEEPS, WITHIN, Comparison, compare_plan, compare_sweeps
from llama_ft.reporting.curves import charts, points_of
from llama_ft.reporting.figure import SIDE_COLORS, draw_panels, pair_panels, svg_panel
from llama_ft.reporting.page import render
from llama_ft.reporting.reading import read_groups
from llama_ft.reporting.repeats import runs_of, spread_of
from llama_ft.reporting.results import value_of
from llama_ft.reporting.table import CHANGED, Table, csv_text, markdown, plain_text, print_notes, print_table

FILES = ("comparison.csv", "comparison.md", "comparison.png", "comparison.html")
# Smallest changes that are colored; times differ by a few percent from run to run.
NOTEWORTHY = {"runtime_s": 0.05, "tokens_per_s": 0.05, "peak_memory_mib": 0.005, "peak_memory_reserved_mib": 0.005}
NOTEWORTHY_LOSS = 0.005  # and of accuracy
MORE_IS_BETTER = ("tokens_per_s", "eval_token_accuracy")


def report_comparison(first: Path, second: Path, console: Console) -> None:
    """Print and write the comparison of a sweep with a second one, or with a plan, into the second folder."""
    groups = read_groups(first)
    if is_plan(second):
        comparisons, alone = compare_plan(groups, read_record(Plan, second / PLAN_FILE))
        refusal = f"{second / PLAN_FILE} predicts no run of {first}: {'; '.join(alone)}"
    else:
        comparisons, alone = compare_sweeps(groups, read_groups(second))
        refusal = f"{first} and {second} have no run of the same model, data and combination"
    if not comparisons:
        raise UserError(refusal)
    check_replaceable(second, FILES, mark="combination")
    names = [f"{side}: {folder}" for side, folder in zip(comparisons[0].sides.names, (first, second), strict=True)]
    for comparison in comparisons:
        print_table(comparison.table, console)
        print_notes(comparison.settings_lines, console)
    console.print()
    print_notes(names + alone, console)
    with explained(f"the comparison cannot be written into {second}"):
        write_files(comparisons, alone, names, second)
    console.print(f"\nWritten: {', '.join(FILES)} in {second}", highlight=False, markup=False, soft_wrap=True)


def write_files(comparisons: list[Comparison], about: list[str], names: list[str], folder: Path) -> None:
    """Write all files of a comparison; `names` are those of the sides."""
    page = comparison_page(comparisons, about, names)  # before a file is written: it reads files that may be damaged
    panels = [pair_panels(comparison.a, comparison.b, names) for comparison in comparisons]
    titles = [comparison.title for comparison in comparisons]
    heights = [0.56 * len(comparison.pairs) for comparison in comparisons]
    text = [*(f"- {plain_text(line)}" for line in names + about), ""]
    for comparison in comparisons:
        lines = comparison.settings_lines
        if comparison.settings:
            lines = ["Not the same:", "", *(f"- {plain_text(line)}" for line in lines)]
        text += [markdown(comparison.table), *lines, ""]
    write_text(folder / "comparison.csv", comparison_csv(comparisons))
    write_text(folder / "comparison.md", "\n".join(text))
    draw_panels(panels, titles, heights, folder / "comparison.png")
    write_text(folder / "comparison.html", page)


def comparison_csv(comparisons: list[Comparison]) -> str:
    """A row for each pair, numbers unrounded; differences are shares, or absolute for losses and accuracy.

    With repeats, numbers are means, and more columns have the number of runs and their spread.
    """
    sides, keys = comparisons[0].sides, [measure.key for measure in COMPARED]
    has_repeats = any(comparison.a.seeds or comparison.b.seeds for comparison in comparisons)
    columns = ["combination", "variant", "model", "data", "device", "gpu", *(f"status.{side}" for side in sides.names)]
    columns += [f"{key}.{part}" for key in keys for part in (*sides.names, sides.difference)]
    if has_repeats:
        columns += [f"{key}.{side}" for side in sides.names for key in ("runs", *(f"{key}.half_width" for key in keys))]
    rows: list[list[Any]] = []
    for comparison in comparisons:
        variants = comparison.a.labels if comparison.a.settings else [comparison.a.variant] * len(comparison.pairs)
        for variant, (a, b) in zip(variants, comparison.pairs, strict=True):
            known = [a.combination, variant, a.model, a.data, a.device, b.gpu, a.status, b.status]
            numbers = [(value_of(a, key), value_of(b, key), comparison.change(a, b, key)) for key in keys]
            rows.append([*known, *(number for three in numbers for number in three)])
            for side in (a, b) if has_repeats else ():
                rows[-1] += [len(runs_of(side)), *(spread_of(side, key) for key in keys)]
    return csv_text(columns, rows)


def comparison_page(comparisons: list[Comparison], about: list[str], names: list[str]) -> str:
    """For each pair of groups the settings that differ, the table, the picture and the loss."""
    title = " and ".join(Path(name.partition(": ")[2]).resolve().name for name in names)
    sections: list[dict[str, Any]] = []
    for comparison in comparisons:
        sides, is_of_sweeps = comparison.sides.names, comparison.sides is SWEEPS
        height = 0.46 * len(comparison.pairs) + 0.7
        memory, runtime = (svg_panel(draw, 5.2, height) for draw in pair_panels(comparison.a, comparison.b, sides))
        both = " and ".join(sides)
        settings = [(name, [a, b]) for name, a, b in comparison.settings]
        section = {
            "comparison": comparison,
            "settings": Table("Settings that are not the same", [("Not the same", list(sides))], settings, []),
            "bars": {f"peak memory, {both}": memory, f"runtime, {both}": runtime},
            "legend": dict(zip(sides, SIDE_COLORS, strict=True)),
            "marks": _marks(comparison) if is_of_sweeps else {},
            "losses": _losses(comparison) if is_of_sweeps else {},
        }
        sections.append(section)
    legend = dict(zip(names, SIDE_COLORS, strict=True))
    return render("comparison.html.jinja", title=title, legend=legend, about=about, sections=sections)


def _marks(comparison: Comparison) -> dict[int, list[str]]:
    """CSS classes of the table's differences, by the number of their row; notable ones are colored."""
    rows, marks = comparison.table.rows, {}
    for number, (_, key, *_) in enumerate(comparison.measures):
        changes, row = [comparison.change(a, b, key) for a, b in comparison.pairs], 4 * number + 3
        marks[row] = [_mark(change, key, cell) for change, cell in zip(changes, rows[row][1], strict=True)]
    return marks


def _mark(change: float | None, key: str, cell: str) -> str:
    if change is None:
        return "changed" if cell == CHANGED else ""
    if abs(change) < NOTEWORTHY.get(key, NOTEWORTHY_LOSS) or cell.endswith(WITHIN):
        return ""
    return "better" if (change < 0) != (key in MORE_IS_BETTER) else "worse"


def _losses(comparison: Comparison) -> dict[str, bytes]:
    """For each combination the loss over the steps, of all runs of both sweeps in one picture."""
    pictures: dict[str, bytes] = {}
    for number, result in enumerate(comparison.a.results):
        lines, colors = [], []
        for group, color in zip((comparison.a, comparison.b), SIDE_COLORS, strict=True):
            folders = [run.folder for row, run in group.runs if row == number]
            lines += [points_of(read_metrics(folder), "loss") for folder in folders]
            colors += [color] * len(folders)
        if any(lines):
            pictures |= charts({f"{combination_label(result.optim)}: loss": lines}, colors)
    return pictures
