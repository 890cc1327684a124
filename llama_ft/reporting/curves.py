"""Curves over a run's optimizer steps, as small pictures."""

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from llama_ft.records.metrics import StepMetrics
from llama_ft.reporting.figure import svg_panel

CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "memory_mib": "memory in use, MiB",
}
MAX_POINTS = 120  # of a curve; its picture is hardly wider
WIDTH, HEIGHT = 2.5, 1.7  # inches
INSIDE = (0.22, 0.25, 0.69, 0.6)  # where the axes are
MIN_SPAN = 0.05  # of the largest value: noise in the fifth figure is not blown up to a mountain

Points = list[tuple[int, float]]  # optimizer step, value


def points_of(metrics: list[StepMetrics], key: str) -> Points:
    """(step, value) of each step whose value is a finite number."""
    values = [(line.step, getattr(line, key)) for line in metrics]
    return [(step, value) for step, value in values if value is not None and math.isfinite(value)]


def run_charts(metrics: list[StepMetrics]) -> dict[str, bytes]:
    """A picture for each of CURVES, all over the same steps, by what is read aloud of it."""
    curves = {title: [points_of(metrics, key)] for key, title in CURVES.items()}
    return charts(curves, ("#0072B2",), [line.step for line in metrics])


def charts(curves: dict[str, list[Points]], colours: Sequence[str], steps: Sequence[int] = ()) -> dict[str, bytes]:
    """A picture for each title, of its curves in their colours, over axes that take in `steps`."""
    pictures = {}
    for title, lines in curves.items():
        draw = partial(chart, title=title, lines=lines, colours=colours, steps=steps)
        points = [point for line in lines for point in line]
        ends = [f"{value:.4g} at step {step}" for step, value in (min(points), max(points))] if points else []
        pictures[f"{title}: {', '.join(ends) or 'no values'}"] = svg_panel(draw, WIDTH, HEIGHT, INSIDE)
    return pictures


def chart(axes: Axes, title: str, lines: list[Points], colours: Sequence[str], steps: Sequence[int]) -> None:
    """Lines through the means of stretches of steps; where those hold several, over a band from minimum to maximum."""
    for points, colour in zip(lines, colours, strict=True):
        n = min(len(points), MAX_POINTS)
        parts = [points[i * len(points) // n : (i + 1) * len(points) // n] for i in range(n)]
        middles = [fmean(step for step, _ in part) for part in parts]
        heights = [[value for _, value in part] for part in parts]
        if n < len(points):
            axes.fill_between(middles, list(map(min, heights)), list(map(max, heights)), color=colour, alpha=0.25, lw=0)
        axes.plot(middles, list(map(fmean, heights)), color=colour, lw=1.2, marker="o" if n == 1 else "", markersize=5)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.tick_params(labelsize=8)
    points = [point for line in lines for point in line]
    if not points:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color="#595959", fontsize=9)
        return
    shown = [*steps, *(step for step, _ in points)]
    axes.set_xlim(min(shown), max(shown) if min(shown) < max(shown) else None)
    values = [value for _, value in points]
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, 0.55 * max(high - low, MIN_SPAN * max(abs(low), abs(high)) or 1.0)
    axes.set_ylim(middle - half, middle + half)
    for axis, locator in ((axes.xaxis, MaxNLocator(4, integer=True)), (axes.yaxis, MaxNLocator(4))):
        axis.set_major_locator(locator)
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("optimizer step", loc="right", fontsize=8)
