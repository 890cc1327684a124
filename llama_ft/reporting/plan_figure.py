"""Pictures of a plan: memory by category against the card's, memory over a step, combinations against cards.

Colours are those of the measured pictures. `plan.png` has the bars; a page has each panel by itself, as SVG.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llama_ft.records import CATEGORIES
from llama_ft.reporting.figure import (
    COLOURS,
    FAR_LIMIT,
    LIMIT_COLOUR,
    RUNTIME_COLOUR,
    annotate,
    drawing,
    finish,
    save_png,
    stack_bars,
    svg_panel,
)
from llama_ft.reporting.plan_file import Plan, Rows, rows_on
from llama_ft.reporting.plan_tables import ERROR, TOO_LARGE, UNKNOWN, runtime_name, title
from llama_ft.reporting.results import label
from llama_ft.reporting.table2 import amount

RESERVED_COLOUR, INSTANT_COLOUR = "#D9D9D9", "#777777"
UNUSED, USABLE = "reserved, not in use", "usable memory of the card"
MAX_SIDE_BY_SIDE = 3  # panels in a row of plan.png
FAR_ABOVE = 2  # a limit beyond so many times the highest point would press a timeline down
HEAT_COLOURS, MAX_SHARE = "PuOr_r", 2.0  # orange for what does not fit, as far as twice what there is
COORDINATE = re.compile(rb"(\d\.\d\d)\d+")
DARK_BELOW, DARK_ABOVE = 0.5, 1.6  # shares whose colours black letters are hard to read on

Gpu = dict[str, Any]


def usable_mib(gpu: Gpu) -> float | None:
    """What PyTorch's allocator can have on a card."""
    return None if gpu["memory_mib"] is None else float(gpu["memory_mib"] - gpu["context_mib"])


def limit_in_bars(gpu: Gpu, rows: Rows) -> float | None:
    """The limit as the bars show it; None where it is not known, or so far off that no bar could be seen."""
    usable = usable_mib(gpu)
    return usable if usable is not None and usable <= FAR_LIMIT * _largest(rows) else None


def _largest(rows: Rows) -> float:
    return max((_end(row) for row in rows if not row["error"]), default=0.0)


def _end(row: dict[str, Any]) -> float:
    """Where a row's bar ends: at what is reserved, on the CPU at the tensors."""
    return float(row["peak_memory_mib"] if row["reserved_mib"] is None else row["reserved_mib"])


def has_times(plan: Plan) -> bool:
    """Whether runtimes have a picture: of one card, where some are known."""
    return len(plan["gpus"]) == 1 and any(row["runtime_s"] is not None for row in plan["rows"])


def draw_plan(plan: Plan, file: Path) -> None:
    """Write one picture: for one card memory and runtime, for several the memory of each."""
    gpus = plan["gpus"]
    beside = min(len(gpus), MAX_SIDE_BY_SIDE)
    n_rows = -(-len(gpus) // beside)
    with drawing():
        height = 0.4 * len(rows_on(plan, gpus[0]["name"])) + 0.9
        figure = Figure(figsize=(10 if len(gpus) == 1 else 5 * beside, n_rows * height + 0.6), layout="constrained")
        figure.set_dpi(150)
        n_columns = max(2, beside)
        ratios = (3, 2) if len(gpus) == 1 else [1] * n_columns
        axes = figure.subplots(n_rows, n_columns, squeeze=False, width_ratios=ratios).ravel()
        for gpu, panel in zip(gpus, axes, strict=False):
            memory_panel(panel, plan, gpu, with_title=len(gpus) > 1)
        if has_times(plan):
            runtime_panel(axes[1], plan, gpus[0])
            axes[1].set_yticklabels([])
        for panel in axes[len(gpus) + has_times(plan) :]:
            panel.set_visible(False)
        of = gpus[0]["name"] if len(gpus) == 1 else f"{len(gpus)} GPUs"
        figure.suptitle(textwrap.fill(title(plan, of), 110), x=0.01, ha="left", fontsize=11)
        names = {text: key for panel in axes for key, text in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(names.values(), names.keys(), loc="outside lower left", ncols=4, frameon=False, columnspacing=1.2)
        save_png(figure, file)


def memory_panels(plan: Plan) -> list[bytes]:
    """For each card, the bars of its combinations as an SVG picture."""
    panels = []
    for gpu in plan["gpus"]:
        height = 0.31 * len(rows_on(plan, gpu["name"])) + 0.9
        panels.append(svg_panel(height, memory_panel, plan, gpu, len(plan["gpus"]) > 1))
    return panels


def runtime_svg(plan: Plan) -> bytes:
    """The runtimes on the first card."""
    gpu = plan["gpus"][0]
    return svg_panel(0.31 * len(rows_on(plan, gpu["name"])) + 0.9, runtime_panel, plan, gpu)


def memory_panel(axes: Axes, plan: Plan, gpu: Gpu, with_title: bool = False) -> None:
    """Bars by category, what is reserved beyond them, and what the allocator can have on the card."""
    rows = rows_on(plan, gpu["name"])
    ends = stack_bars(axes, [row["memory_mib"] or {} for row in rows])
    on_cuda = any(row["reserved_mib"] is not None for row in rows)
    if on_cuda:
        beyond = [0.0 if row["error"] else _end(row) - end for row, end in zip(rows, ends, strict=True)]
        axes.barh(range(len(rows)), beyond, left=ends, color=RESERVED_COLOUR, height=0.7, label=UNUSED)
    limit = limit_in_bars(gpu, rows)
    if limit is not None:
        axes.axvline(limit, color=LIMIT_COLOUR, linestyle="--", label=USABLE)
    for position, row in enumerate(rows):
        mark = f" {TOO_LARGE}" if row["fits"] is False else ""
        text = ERROR if row["error"] else amount(_end(row)) + mark
        annotate(axes, 0.0 if row["error"] else _end(row), position, text, bool(row["error"] or mark))
    has_bars = any(not row["error"] for row in rows)
    finish(axes, [label(row) for row in rows], f"{'reserved' if on_cuda else 'peak'} memory, MiB", has_bars)
    if has_bars:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(0, 1.22 * max(_largest(rows), limit or 0.0))
    if with_title:
        axes.set_title(gpu["name"], loc="left", fontsize=11)


def runtime_panel(axes: Axes, plan: Plan, gpu: Gpu) -> None:
    """Runtimes as bars, also of what does not fit."""
    rows = rows_on(plan, gpu["name"])
    seconds = [row["runtime_s"] for row in rows]
    axes.barh(range(len(rows)), [value or 0.0 for value in seconds], color=RUNTIME_COLOUR, height=0.7)
    for position, (row, value) in enumerate(zip(rows, seconds, strict=True)):
        mark = f" {TOO_LARGE}" if row["fits"] is False else ""
        text = ERROR if row["error"] else UNKNOWN if value is None else amount(value) + mark
        annotate(axes, value or 0.0, position, text, bool(row["error"] or mark))
    xlabel = "runtime, s, at best" if "best" in runtime_name(plan, rows) else "runtime, s"
    finish(axes, [label(row) for row in rows], xlabel, any(seconds))
    if any(seconds):
        axes.set_xlim(0, 1.25 * max(value or 0.0 for value in seconds))


def timeline_svg(row: dict[str, Any], limit: float | None, width: float, height: float) -> bytes:
    """Memory by category over one optimizer step, as an SVG picture."""
    # Six decimals of a point are most of such a file.
    svg = svg_panel(height, timeline_panel, row, limit, width=width)
    return re.sub(rb' d="[^"]*"', lambda path: COORDINATE.sub(rb"\1", path[0]), svg)


def timeline_panel(axes: Axes, row: dict[str, Any], limit: float | None) -> None:
    """Areas by category over the step's allocations, and which part of the step they belong to."""
    points = row["timeline"]
    events = list(range(len(points)))
    stacks = [[point["memory_mib"][category] for point in points] for category in CATEGORIES]
    highest = max(sum(point["memory_mib"].values()) for point in points)
    axes.stackplot(events, *stacks, colors=[COLOURS[category] for category in CATEGORIES], linewidth=0)
    if limit is not None and limit <= FAR_ABOVE * highest:
        axes.axhline(limit, color=LIMIT_COLOUR, linestyle="--")
        highest = max(highest, limit)
    starts = [n for n in events if n == 0 or points[n]["phase"] != points[n - 1]["phase"]]
    for start in starts[1:]:
        axes.axvline(start, color=INSTANT_COLOUR, linewidth=0.8)
    middles = [(start + end) / 2 for start, end in zip(starts, [*starts[1:], events[-1]], strict=True)]
    axes.set_xticks(middles, [points[start]["phase"] for start in starts])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, max(1, events[-1]))
    axes.set_ylim(0, 1.05 * highest)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_ylabel("MiB")
    axes.set_title(label(row), loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def heat_map_svg(plan: Plan) -> bytes | None:
    """How much of each card's memory each combination needs; None for one card, or where no memory is known."""
    gpus = [gpu for gpu in plan["gpus"] if gpu["memory_mib"]]
    if len(gpus) < 2:
        return None
    n_combinations = len(rows_on(plan, gpus[0]["name"]))
    return svg_panel(0.3 * n_combinations + 1.3, heat_map, plan, gpus, width=1.9 + 0.85 * len(gpus))


def heat_map(axes: Axes, plan: Plan, gpus: list[Gpu]) -> None:
    """Cells of required / available, in per cent, marked where that is more than there is."""
    columns = [rows_on(plan, gpu["name"]) for gpu in gpus]
    shares = [[_share(row) for row in alike] for alike in zip(*columns, strict=True)]
    values = [[float("nan") if share is None else min(share, MAX_SHARE) for share in line] for line in shares]
    axes.imshow(values, cmap=HEAT_COLOURS, norm=TwoSlopeNorm(1.0, 0.0, MAX_SHARE), aspect="auto")
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            row = columns[x][y]
            text = ERROR if row["error"] else UNKNOWN if share is None else f"{share:.0%}"
            text += f" {TOO_LARGE}" if row["fits"] is False else ""
            is_dark = share is not None and not DARK_BELOW < share < DARK_ABOVE
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if is_dark else "black")
    axes.set_yticks(range(len(shares)), [label(row) for row in columns[0]])
    names = [f"{gpu['name']}\n{gpu['memory_mib']:,} MiB" for gpu in gpus]
    axes.set_xticks(range(len(gpus)), names, rotation=35, ha="left", rotation_mode="anchor", fontsize=9)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.set_xticks([x - 0.5 for x in range(1, len(gpus))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(shares))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def _share(row: dict[str, Any]) -> float | None:
    """Required of available memory."""
    if row["error"] or row["required_mib"] is None or not row["total_memory_mib"]:
        return None
    return float(row["required_mib"] / row["total_memory_mib"])
