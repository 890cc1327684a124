"""Pictures: memory stacked by category with its limit, and runtime; of two sweeps, A's bars and B's below each other.

As PNG files with the panels beside each other, and for a page each panel by itself as SVG.
"""

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama_ft.files import whole_file
from llama_ft.records import CATEGORIES
from llama_ft.reporting.curves import PAIR_COLOURS
from llama_ft.reporting.results import Group, label, limit_of
from llama_ft.reporting.table2 import MARKS, amount

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = dict(zip(CATEGORIES, ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#999999"), strict=True))
RUNTIME_COLOUR, LIMIT_COLOUR, FAILED_COLOUR = "#555555", "#D55E00", "#B3261E"
FAR_LIMIT = 4  # a limit beyond so many times the largest peak would leave no bar to look at
MARGIN = 0.2  # above and below the bars, in rows
PAIR_PANELS = (("peak_memory_mib", "peak memory, MiB"), ("runtime_s", "runtime, s"))

Results = list[dict[str, Any]]


@contextmanager
def drawing() -> Iterator[None]:
    """Texts as they are given: no formulas in them, and no warning of a letter that the font lacks."""
    with (
        matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "llama_ft"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def draw_table2(groups: list[Group], file: Path) -> None:
    """Write one picture with a row of two panels for each group."""
    with drawing():
        rows = [len(group.results) + MARGIN for group in groups]
        figure = Figure(figsize=(10, 0.42 * sum(rows) + 0.8 * len(rows) + 0.4), layout="constrained", dpi=150)
        axes = figure.subplots(len(groups), 2, squeeze=False, width_ratios=(3, 2), height_ratios=rows)
        for group, (memory, runtime) in zip(groups, axes, strict=True):
            _memory_panel(memory, group.results)
            _runtime_panel(runtime, group.results)
            runtime.set_yticklabels([])
            memory.set_title(textwrap.fill(group.title, 100), loc="left", fontsize=10)
        names = {text: key for row in axes for key, text in zip(*row[0].get_legend_handles_labels(), strict=True)}
        figure.legend(names.values(), names.keys(), loc="outside lower left", ncols=6, frameon=False, columnspacing=1.2)
        save_png(figure, file)


def draw_comparison(pairs: list[tuple[Group, Group]], titles: list[str], names: tuple[str, str], file: Path) -> None:
    """Write one picture with a row of two panels for each pair of groups; `names` are those of A and B."""
    with drawing():
        rows = [len(a.results) + MARGIN for a, _ in pairs]
        figure = Figure(figsize=(10, 0.56 * sum(rows) + 0.8 * len(rows) + 0.6), layout="constrained", dpi=150)
        axes = figure.subplots(len(pairs), 2, squeeze=False, height_ratios=rows)
        for pair, title, row in zip(pairs, titles, axes, strict=True):
            for panel, (key, xlabel) in zip(row, PAIR_PANELS, strict=True):
                _pair_panel(panel, pair, key, xlabel)
            row[1].set_yticklabels([])
            row[0].set_title(textwrap.fill(title, 100), loc="left", fontsize=10)
        handles, letters = axes[0][0].get_legend_handles_labels()
        texts = [f"{letter}: {name}" for letter, name in zip(letters, names, strict=True)]
        figure.legend(handles, texts, loc="outside lower left", frameon=False)
        save_png(figure, file)


def table2_panels(group: Group) -> list[bytes]:
    """Memory and runtime of a group, each as an SVG picture."""
    height = 0.31 * len(group.results) + 0.7
    return [svg_panel(height, draw, group.results) for draw in (_memory_panel, _runtime_panel)]


def comparison_panels(pair: tuple[Group, Group]) -> list[bytes]:
    """Memory and runtime of two groups of the same combinations, each as an SVG picture."""
    height = 0.46 * len(pair[0].results) + 0.7
    return [svg_panel(height, _pair_panel, pair, key, xlabel) for key, xlabel in PAIR_PANELS]


def limit_in_picture(results: Results) -> int | None:
    """The limit that the memory panel shows.

    None where it would say nothing: on the CPU it is one on the whole process, not on its tensors; and far off it
    would press the bars into a corner.
    """
    limit: int | None = limit_of(results)
    largest = max((r["peak_memory_mib"] for r in results if r["status"] == "ok"), default=0)
    on_cuda = any(r["peak_memory_reserved_mib"] for r in results)
    return limit if limit is not None and on_cuda and limit <= FAR_LIMIT * largest else None


def svg_panel(height: float, draw: Callable[..., None], *arguments: Any, width: float = 5.2) -> bytes:
    """What `draw` draws into axes of so many inches, as an SVG picture."""
    with drawing():
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots(), *arguments)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


def save_png(figure: Figure, file: Path) -> None:
    """Write a picture whole or not at all."""
    with whole_file(file) as temporary:
        figure.savefig(temporary, format="png")


def stack_bars(axes: Axes, memories: list[dict[str, float]]) -> list[float]:
    """A bar for each, stacked by category; where they end."""
    ends = [0.0] * len(memories)
    for category in CATEGORIES:
        sizes = [memory.get(category, 0.0) for memory in memories]
        name = category.replace("_", " ")
        axes.barh(range(len(memories)), sizes, left=ends, color=COLOURS[category], label=name, height=0.7)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    return ends


def _memory_panel(axes: Axes, results: Results) -> None:
    stack_bars(axes, [r["memory_mib"] or {} if r["status"] == "ok" else {} for r in results])
    limit = limit_in_picture(results)
    if limit is not None:
        axes.axvline(limit, color=LIMIT_COLOUR, linestyle="--", label=f"limit {limit:,} MiB")
    for position, result in enumerate(results):
        _annotate(axes, position, result, result["peak_memory_mib"])
    _finish(axes, results, "peak memory, MiB")


def _runtime_panel(axes: Axes, results: Results) -> None:
    axes.barh(range(len(results)), [_value(r, "runtime_s") or 0.0 for r in results], color=RUNTIME_COLOUR, height=0.7)
    for position, result in enumerate(results):
        _annotate(axes, position, result, result["runtime_s"])
    _finish(axes, results, "runtime, s")


def _pair_panel(axes: Axes, pair: tuple[Group, Group], key: str, xlabel: str) -> None:
    for offset, (name, colour), group in zip((-0.2, 0.2), PAIR_COLOURS.items(), pair, strict=True):
        positions = [position + offset for position in range(len(group.results))]
        axes.barh(positions, [_value(r, key) or 0.0 for r in group.results], color=colour, height=0.38, label=name)
        for position, result in zip(positions, group.results, strict=True):
            _annotate(axes, position, result, result[key])
    _finish(axes, pair[0].results, xlabel)


def _value(result: dict[str, Any], key: str) -> float | None:
    """What was measured of a run that finished."""
    value: float | None = result[key] if result["status"] == "ok" else None
    return value


def _annotate(axes: Axes, position: float, result: dict[str, Any], value: float | None) -> None:
    """A bar's value at its end; the mark of a run that failed where its bar would begin."""
    failed = result["status"] != "ok"
    text = MARKS.get(result["status"], "–") if failed or value is None else amount(value)
    annotate(axes, 0.0 if failed or value is None else value, position, text, failed)


def annotate(axes: Axes, end: float, position: float, text: str, failed: bool = False) -> None:
    """A text behind the end of a bar."""
    axes.annotate(
        text,
        (end, position),
        xytext=(4, 0),
        textcoords="offset points",
        va="center_baseline",
        fontsize=10,
        color=FAILED_COLOUR if failed else "black",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # over the limit's line
    )


def _finish(axes: Axes, results: Results, xlabel: str) -> None:
    finish(axes, [label(r) for r in results], xlabel, any(r["status"] == "ok" for r in results))


def finish(axes: Axes, labels: list[str], xlabel: str, has_bars: bool) -> None:
    """What all panels of bars have in common."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5 + MARGIN / 2, -0.5 - MARGIN / 2)
    axes.margins(x=0.15)
    if has_bars:
        axes.set_xlim(left=0)
    else:
        axes.set_xlim(0, 1)
        axes.set_xticks([])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
