"""A comparison as one HTML page that needs nothing but itself."""

from collections.abc import Sequence
from pathlib import Path

from llama_ft.config.techniques import combination_label
from llama_ft.records.result import Result
from llama_ft.reporting.comparison import COMPARED, SAME_SETTINGS, SWEEPS, Comparison
from llama_ft.reporting.curves import charts, points_of
from llama_ft.reporting.figure import SIDE_COLOURS, pair_panels, svg_panel
from llama_ft.reporting.markup import document, html_table, legend, notes, pictures, text
from llama_ft.reporting.page import Metrics
from llama_ft.reporting.table import CHANGED, Table

# From which change on a difference is coloured; times differ by a few percent from run to run.
NOTEWORTHY = {"runtime_s": 0.05, "tokens_per_s": 0.05, "peak_memory_mib": 0.005, "peak_memory_reserved_mib": 0.005}
NOTEWORTHY_LOSS = 0.005
COLOURS_NOTE = (
    "Blue: B is better; orange: worse; yellow: one of the two failed. Coloured from 0.5 % of memory, 5 % of time and"
    " 0.005 of loss on."
)


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
