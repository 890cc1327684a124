"""The picture of Table 2: memory stacked by category with its limit, runtime beside it."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama_ft.measure.result import CATEGORIES
from llama_ft.reporting.results import Group, label
from llama_ft.reporting.table2 import MARKS, amount

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = dict(zip(CATEGORIES, ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#999999"), strict=True))
RUNTIME_COLOUR, LIMIT_COLOUR = "#555555", "#D55E00"


def draw_table2(groups: list[Group], file: Path) -> None:
    """Write one picture with a row of two panels for each group."""
    heights = [0.42 * len(group.results) + 1.5 for group in groups]
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained", dpi=150)
    axes = figure.subplots(len(groups), 2, squeeze=False, width_ratios=(3, 2), height_ratios=heights)
    for group, (memory, runtime) in zip(groups, axes, strict=True):
        _memory_panel(memory, group.results)
        _runtime_panel(runtime, group.results)
        memory.set_title(group.title, loc="left", fontsize=10)
    handles = {text: handle for row in axes for handle, text in zip(*row[0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=7, frameon=False, fontsize=8)
    figure.savefig(file)


def _memory_panel(axes: Axes, results: list[dict[str, Any]]) -> None:
    ends = [0.0] * len(results)
    for category in CATEGORIES:
        sizes = [(r["memory_mb"] or {}).get(category, 0.0) if r["status"] == "ok" else 0.0 for r in results]
        name = category.replace("_", " ")
        axes.barh(range(len(results)), sizes, left=ends, color=COLOURS[category], label=name, height=0.7)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    limit = results[0]["memory_limit_mb"]
    if limit is not None:
        axes.axvline(limit, color=LIMIT_COLOUR, linestyle="--", label=f"limit {limit:,} MB")
        on_cpu = [(r["peak_rss_mb"], row) for row, r in enumerate(results) if not r["peak_memory_reserved_mb"]]
        seen = [(rss, row) for rss, row in on_cpu if rss is not None]
        if seen:  # there the limit is one on the process, not on its tensors
            axes.plot(*zip(*seen, strict=True), "k|", markersize=14, label="peak RSS of the process")
    _finish(axes, results, [r["peak_memory_mb"] for r in results], "peak memory, MB")
    axes.set_yticks(range(len(results)), [label(r) for r in results])


def _runtime_panel(axes: Axes, results: list[dict[str, Any]]) -> None:
    seconds = [r["runtime_s"] if r["status"] == "ok" else 0.0 for r in results]
    axes.barh(range(len(results)), seconds, color=RUNTIME_COLOUR, height=0.7)
    _finish(axes, results, seconds, "runtime, s")
    axes.set_yticks(range(len(results)), [])


def _finish(axes: Axes, results: list[dict[str, Any]], values: list[float | None], xlabel: str) -> None:
    for position, (result, value) in enumerate(zip(results, values, strict=True)):
        _annotate(axes, position, result, value)
    _tidy(axes, xlabel)


def _annotate(axes: Axes, position: float, result: dict[str, Any], value: float | None) -> None:
    """A bar's value at its end; the mark of a run that failed where its bar would begin."""
    measured = value if result["status"] == "ok" else None
    text = MARKS.get(result["status"], "–") if measured is None else amount(measured)
    end = (measured or 0.0, position)
    axes.annotate(text, end, xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)


def _tidy(axes: Axes, xlabel: str) -> None:
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_comparison(pairs: list[tuple[Group, Group]], file: Path) -> None:
    """Write one picture with a row of two panels for each pair: A's and B's bars below each other."""
    heights = [0.62 * len(a.results) + 1.2 for a, _ in pairs]
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained", dpi=150)
    axes = figure.subplots(len(pairs), 2, squeeze=False, height_ratios=heights)
    panels = (("peak_memory_mb", "peak memory, MB"), ("runtime_s", "runtime, s"))
    for pair, row in zip(pairs, axes, strict=True):
        for panel, (key, xlabel) in zip(row, panels, strict=True):
            _pair_panel(panel, pair, key, xlabel)
        row[0].set_yticks(range(len(pair[0].results)), [label(r) for r in pair[0].results])
        row[0].set_title(pair[0].title, loc="left", fontsize=10)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    figure.savefig(file)


def _pair_panel(axes: Axes, pair: tuple[Group, Group], key: str, xlabel: str) -> None:
    for offset, name, colour, group in zip((-0.2, 0.2), "AB", ("#999999", "#0072B2"), pair, strict=True):
        positions = [position + offset for position in range(len(group.results))]
        values = [r[key] if r["status"] == "ok" else 0.0 for r in group.results]
        axes.barh(positions, values, color=colour, height=0.38, label=name)
        for position, value, result in zip(positions, values, group.results, strict=True):
            _annotate(axes, position, result, value)
    _tidy(axes, xlabel)
    axes.set_yticks(range(len(pair[0].results)), [])
