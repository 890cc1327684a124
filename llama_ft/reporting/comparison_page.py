"""The comparison of two sweeps as one HTML page that needs nothing but itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_ft.reporting.curves import PAIR_COLOURS, Line, chart, points_of
from llama_ft.reporting.markup import document, head_row, legend, notes, pictures, row, table, text
from llama_ft.reporting.pairs import DIFFERENCE, MEASURES, SAME, Comparison, change
from llama_ft.reporting.results import Group, label
from llama_ft.reporting.settings import SAME_SETTINGS
from llama_ft.reporting.table2 import CHANGED

# From which change on a difference is coloured; times differ by a few percent from run to run.
NOTEWORTHY = {
    "peak_memory_mib": 0.005,
    "peak_memory_reserved_mib": 0.005,
    "runtime_s": 0.05,
    "tokens_per_s": 0.05,
    "train_loss_after": 0.005,
}
COLOURS_NOTE = (
    "Blue: B is better; orange: worse; yellow: one of the two failed. Coloured from 0.5 % of memory, 5 % of time and"
    " 0.005 of loss on."
)

Metrics = dict[Path, list[dict[str, Any]]]


def comparison_page(
    comparisons: list[Comparison], about: list[str], names: tuple[str, str], panels: list[list[bytes]], metrics: Metrics
) -> str:
    """For each pair of groups the settings that differ, the table, the picture and the loss.

    Args:
        about: notes on both folders as a whole.
        names: of A and B.
        panels: SVG pictures of memory and runtime for each pair.
        metrics: the steps of each run, by its folder.
    """
    short = " and ".join(Path(name).resolve().name for name in names)
    body = [f"<h1>{text(short)}</h1>", pair_legend([f": {name}" for name in names]), notes(about)]
    for each, pair_panels in zip(comparisons, panels, strict=True):
        body += [f"<h2>{text(each.table.title)}</h2>", settings_table(each), difference_table(each)]
        body.append(f'<p class="notes">{COLOURS_NOTE}</p>')
        body += [pair_legend(), pictures(pair_panels, ["peak memory, A and B", "runtime, A and B"])]
        body.append(notes(each.table.notes))
        if charts := loss_charts(each.a, each.b, metrics):
            body += ["<h3>Training loss</h3>", pair_legend(), f'<div class="charts">{charts}</div>']
    return document(f"{short} · llama_ft", body)


def pair_legend(more: Sequence[str] = ("", "")) -> str:
    """Which colour is A's and which B's, with more on each."""
    entries = zip(PAIR_COLOURS.items(), more, strict=True)
    return legend([(letter + words, colour, False) for (letter, colour), words in entries])


def settings_table(each: Comparison) -> str:
    """What is not the same, or that all is."""
    if not each.settings:
        return f'<p class="soft">{SAME_SETTINGS}</p>'
    rows = [row(name, [a, b], kinds=["", ""]) for name, a, b in each.settings]
    return table("What is not the same", [head_row("Not the same", ["A", "B"])], rows, "texts")


def difference_table(each: Comparison) -> str:
    """Each measure of A and B, and how far they are apart, coloured where that is worth a look."""
    columns = len(each.a.results)
    rows, key, titles = [], "", {title: key for key, title in MEASURES.items()}
    for name, cells in each.table.rows:
        if name in titles:
            key = titles[name]
            rows.append(row(name, cells, "section"))
        elif name == DIFFERENCE:
            pairs = zip(each.a.results, each.b.results, cells, strict=True)
            rows.append(row(name.strip(), cells, "sub", [mark(a, b, key, cell) for a, b, cell in pairs]))
        else:
            rows.append(row(name.strip(), cells, "sub"))
    head = [head_row(name, cells) for name, cells in each.table.techniques]
    return table(each.table.title, head, rows, "many" if columns > 8 else "")


def mark(a: dict[str, Any], b: dict[str, Any], key: str, shown: str) -> str:
    """The class of a difference: `better` or `worse`, whichever way the measure goes."""
    if shown in (SAME, CHANGED):
        return "changed" if shown == CHANGED else ""
    by = change(a, b, key) or 0.0
    if abs(by) < NOTEWORTHY[key]:
        return ""
    return "better" if (by < 0) != (key == "tokens_per_s") else "worse"


def loss_charts(a: Group, b: Group, metrics: Metrics) -> str:
    """For each combination the loss of both over the steps."""
    charts = []
    for result, run_a, run_b in zip(a.results, a.folders, b.folders, strict=True):
        lines = [Line("a", points_of(metrics[run_a], "loss")), Line("b", points_of(metrics[run_b], "loss"))]
        if any(line.points for line in lines):
            charts.append(chart(f"{label(result)}: loss", lines))
    return "".join(charts)
