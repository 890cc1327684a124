"""The report of a comparison: printed, and as Markdown, numbers, a picture and a page in the second folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llama_ft.config import UserError
from llama_ft.config.techniques import combination_label
from llama_ft.files import write_text
from llama_ft.records.metrics import read_metrics
from llama_ft.records.plan import PLAN_FILE, is_plan, read_plan_file
from llama_ft.records.result import Result
from llama_ft.reporting.comparison import COMPARED, SAME_SETTINGS, SWEEPS, Comparison, compare_plan, compare_sweeps
from llama_ft.reporting.curves import charts, points_of
from llama_ft.reporting.figure import SIDE_COLOURS, draw_panels, pair_panels, svg_panel
from llama_ft.reporting.markup import document, html_table, legend, notes, pictures, text
from llama_ft.reporting.page import Metrics
from llama_ft.reporting.results import read_groups, value_of
from llama_ft.reporting.table import CHANGED, Table, csv_text, markdown, print_notes, print_table

FILES = ("comparison.md", "comparison.csv", "comparison.png", "comparison.html")
# From which change on a difference is coloured; times differ by a few percent from run to run.
NOTEWORTHY = {"runtime_s": 0.05, "tokens_per_s": 0.05, "peak_memory_mib": 0.005, "peak_memory_reserved_mib": 0.005}
NOTEWORTHY_LOSS = 0.005
COLOURS_NOTE = (
    "Blue: B is better; orange: worse; yellow: one of the two failed. Coloured from 0.5 % of memory, 5 % of time and"
    " 0.005 of loss on."
)


def report_comparison(first: Path, second: Path, console: Console) -> None:
    """Print and write the comparison of a sweep with a second one, or with a plan, into the second folder.

    Raises:
        UserError: if a folder holds no results or plan, a file is damaged, there is nothing to compare, or the second
            folder cannot be written to.
    """
    groups = read_groups(first)
    if is_plan(second):
        comparisons, alone = compare_plan(groups, read_plan_file(second))
        refusal = f"{second / PLAN_FILE} predicts no run of {first}: {'; '.join(alone)}"
    else:
        comparisons, alone = compare_sweeps(groups, read_groups(second))
        refusal = f"{first} and {second} have no run of the same model, data and combination"
    if not comparisons:
        raise UserError(refusal)
    names = [f"{side}: {folder}" for side, folder in zip(comparisons[0].sides.names, (first, second), strict=True)]
    for comparison in comparisons:
        print_table(comparison.table, console)
        print_notes(comparison.settings_lines, console)
    console.print()
    print_notes(names + alone, console)
    try:
        write_files(comparisons, alone, names, second)
    except OSError as error:
        raise UserError(f"the comparison cannot be written into {second}: {error.strerror}") from error
    console.print(f"\nWritten: {', '.join(FILES)} in {second}", highlight=False, markup=False, soft_wrap=True)


def write_files(comparisons: list[Comparison], about: list[str], names: list[str], folder: Path) -> None:
    """Write all files of a comparison; `names` are those of the sides."""
    metrics = {run_dir: read_metrics(run_dir) for each in comparisons for run_dir in (*each.a.folders, *each.b.folders)}
    panels = [pair_panels(each.a, each.b, names) for each in comparisons]
    titles, heights = [each.title for each in comparisons], [0.56 * len(each.pairs) for each in comparisons]
    write_text(folder / "comparison.md", comparison_markdown(comparisons, names + about))
    write_text(folder / "comparison.csv", comparison_csv(comparisons))
    draw_panels(panels, titles, heights, folder / "comparison.png")
    write_text(folder / "comparison.html", comparison_page(comparisons, about, names, metrics))


def comparison_markdown(comparisons: list[Comparison], about: list[str]) -> str:
    """For `comparison.md`."""
    parts = [*(f"- {line}" for line in about), ""]
    for each in comparisons:
        parts += [markdown(each.table), "Not the same:" if each.settings else SAME_SETTINGS, ""]
        parts += [*(f"- {line}" for line in each.settings_lines), ""] if each.settings else []
    return "\n".join(parts)


def comparison_csv(comparisons: list[Comparison]) -> str:
    """For `comparison.csv`: a row for each pair, numbers unrounded; a difference is a share, of the loss in itself."""
    sides, keys = comparisons[0].sides, [measure.key for measure in COMPARED]
    columns = ["combination", "variant", "model", "data", "device", "gpu", *(f"status.{side}" for side in sides.names)]
    columns += [f"{key}.{part}" for key in keys for part in (*sides.names, sides.difference)]
    rows: list[list[Any]] = []
    for each in comparisons:
        for a, b in each.pairs:
            known = [a.combination, each.a.variant, a.model, a.data, a.device, b.gpu, a.status, b.status]
            numbers = [(value_of(a, key), value_of(b, key), each.change(a, b, key)) for key in keys]
            rows.append([*known, *(number for three in numbers for number in three)])
    return csv_text(columns, rows)


def comparison_page(comparisons: list[Comparison], about: list[str], names: list[str], metrics: Metrics) -> str:
    """For each pair of groups the settings that differ, the table, the picture and the loss.

    Args:
        about: notes on both folders as a whole.
        names: of the sides, with their folders.
    """
    title = " and ".join(Path(name.partition(": ")[2]).resolve().name for name in names)
    body = [f"<h1>{text(title)}</h1>", _legend(names), notes(about)]
    for each in comparisons:
        sides = each.sides.names
        body += [f"<h2>{text(each.title)}</h2>", _settings_table(each), _difference_table(each)]
        body += [f'<p class="notes">{COLOURS_NOTE}</p>'] if each.sides is SWEEPS else []
        panels = [svg_panel(draw, 5.2, 0.46 * len(each.pairs) + 0.7) for draw in pair_panels(each.a, each.b, sides)]
        both = " and ".join(sides)
        body += [_legend(sides), pictures(panels, [f"peak memory, {both}", f"runtime, {both}"])]
        body += [notes(each.table.notes), *_losses(each, metrics)]
    return document(f"{title} · llama_ft", body)


def _legend(names: Sequence[str]) -> str:
    """Which colour is which side's."""
    return legend([(name, colour, False) for name, colour in zip(names, SIDE_COLOURS, strict=True)])


def _settings_table(each: Comparison) -> str:
    """What is not the same, or that all is."""
    if not each.settings:
        return f'<p class="soft">{SAME_SETTINGS}</p>'
    rows = [(name, [a, b]) for name, a, b in each.settings]
    return html_table(Table("What is not the same", [("Not the same", list(each.sides.names))], rows, []), kind="texts")


def _difference_table(each: Comparison) -> str:
    """The table, with differences coloured where they are worth a look."""
    keys, key = {measure.title: measure.key for measure in COMPARED}, ""
    kinds = {}
    for number, (name, cells) in enumerate(each.table.rows):
        key = keys.get(name, key)
        if name.strip() == each.sides.difference and each.sides is SWEEPS:
            kinds[number] = [_mark(each, a, b, key, cell) for (a, b), cell in zip(each.pairs, cells, strict=True)]
    return html_table(each.table, kinds)


def _mark(each: Comparison, a: Result, b: Result, key: str, cell: str) -> str:
    """The class of a difference: `better` or `worse`, whichever way the measure goes."""
    by = each.change(a, b, key)
    if by is None:
        return "changed" if cell == CHANGED else ""
    if abs(by) < NOTEWORTHY.get(key, NOTEWORTHY_LOSS):
        return ""
    return "better" if (by < 0) != (key == "tokens_per_s") else "worse"


def _losses(each: Comparison, metrics: Metrics) -> list[str]:
    """For each combination the loss over the steps, of both sweeps in one picture."""
    if each.sides is not SWEEPS:
        return []
    curves = {
        f"{combination_label(result.optim)}: loss": [points_of(metrics[a], "loss"), points_of(metrics[b], "loss")]
        for result, a, b in zip(each.a.results, each.a.folders, each.b.folders, strict=True)
    }
    drawn = {title: lines for title, lines in curves.items() if any(lines)}
    return ["<h3>Training loss</h3>", _legend(each.sides.names), charts(drawn, SIDE_COLOURS)] if drawn else []
