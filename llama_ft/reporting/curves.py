"""Curves of runs over their optimizer steps: training losses, held-out losses and other metrics."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llama_ft.files import whole_file
from llama_ft.records.metrics import EvalMetrics, Metrics, read_metrics
from llama_ft.reporting.figure import drawing, svg_panel
from llama_ft.reporting.results import Group
from llama_ft.reporting.table import Table

CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "memory_mib": "memory in use, MiB",
}
TRAINING_COLOR, HELD_OUT_COLOR = "#0072B2", "#D55E00"
HELD_OUT = "loss (dots: held out)"
MAX_POINTS = 120  # of a curve; its picture is hardly wider
MAX_DOTS = 40
LEAST_MEANS, MAX_MEANS = 10, 30  # of the training loss in a picture of losses
MAX_ROWS = 60  # of the table of held-out losses
MAX_PANELS, N_COLUMNS = 16, 4  # of the picture of losses
WIDTH, HEIGHT = 2.5, 1.7  # inches
INSIDE = (0.22, 0.25, 0.69, 0.6)  # position of the axes
MIN_SPAN = 0.05  # of the largest value, so that noise in the fifth digit does not fill the picture

Points = list[tuple[int, float]]  # optimizer step, value


def run_charts(metrics: Sequence[Metrics]) -> dict[str, bytes]:
    """Pictures of all curves of a run, held-out losses in that of the loss, by their alternative text."""
    curves = {title: [points_of(metrics, key)] for key, title in CURVES.items()} if metrics else {}
    if held_out := points_of(metrics, "eval_loss"):
        curves = {HELD_OUT: [*curves.pop("loss"), held_out], **curves}
    return charts(curves, (TRAINING_COLOR, HELD_OUT_COLOR), [line.step for line in metrics])


def held_out_table(losses: Sequence[EvalMetrics]) -> Table | None:
    """A run's held-out losses; of very many, evenly spaced ones, both ends included. None if there are none."""
    if not losses:
        return None
    n = min(len(losses), MAX_ROWS)
    shown = [losses[i * (len(losses) - 1) // max(1, n - 1)] for i in range(n)]
    rows = [
        (f"{each.step:,}", [f"{each.eval_loss:.4f}", f"{each.eval_perplexity:.4g}", f"{each.eval_token_accuracy:.1%}"])
        for each in shown
    ]
    return Table("Held-out loss", [("After step", ["Loss", "Perplexity", "Token accuracy"])], rows, [])


def draw_losses(groups: Sequence[Group], file: Path) -> None:
    """Write a picture of each row's losses; if no row, or too many, have held-out ones, remove an earlier picture."""
    rows: dict[tuple[int, int], list[list[Metrics]]] = {}  # by group and row
    for n, group in enumerate(groups):
        for number, run in group.runs:
            if points_of(metrics := read_metrics(run.folder), "eval_loss"):
                rows.setdefault((n, number), []).append(metrics)
    if not 0 < len(rows) <= MAX_PANELS:
        file.unlink(missing_ok=True)
        return
    n_columns = min(len(rows), N_COLUMNS)
    with drawing():
        size = (7, 3.6) if len(rows) == 1 else (3.2 * n_columns, 2.4 * -(-len(rows) // n_columns))
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        panels = figure.subplots(-(-len(rows) // n_columns), n_columns, squeeze=False, sharey=True).ravel()
        for panel in panels[len(rows) :]:
            panel.set_visible(False)
        for panel, ((n, number), repeats) in zip(panels, rows.items(), strict=False):
            loss_panel(panel, repeats, groups[n].labels[number])
            panel.label_outer()
        with whole_file(file) as temporary:
            figure.savefig(temporary, format="png")


def loss_panel(axes: Axes, repeats: Sequence[Sequence[Metrics]], title: str) -> None:
    """Draw each run's training loss as means over stretches of steps, and its held-out losses, the lowest marked."""
    for number, metrics in enumerate(repeats):
        training, held_out = points_of(metrics, "loss"), points_of(metrics, "eval_loss")
        parts = stretches(training, max(LEAST_MEANS, min(len(held_out) - 1, MAX_MEANS)))
        means = [(fmean(step for step, _ in part), fmean(value for _, value in part)) for part in parts]
        names = ["training, mean", "held out"] if number == 0 else [None, None]
        if means:
            axes.plot(*zip(*means, strict=True), color=TRAINING_COLOR, lw=1.5, label=names[0])
        size = 4 if len(held_out) <= MAX_DOTS else 0
        axes.plot(*zip(*held_out, strict=True), color=HELD_OUT_COLOR, lw=1.5, label=names[1], marker="o", ms=size)
        step, least = min(held_out, key=lambda point: point[1])
        name = f"{least:.3f} after step {step:,}" if len(repeats) == 1 else "lowest of each" if number == 0 else None
        axes.plot(step, least, "o", markersize=11, fillstyle="none", color="black", label=name)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token, nats")
    axes.legend(frameon=False, fontsize=9)


def points_of(metrics: Sequence[Metrics], key: str) -> Points:
    """(step, value) of each line with a finite value."""
    values = [(line.step, getattr(line, key, None)) for line in metrics]
    return [(step, value) for step, value in values if value is not None and math.isfinite(value)]


def charts(curves: dict[str, list[Points]], colors: Sequence[str], steps: Sequence[int] = ()) -> dict[str, bytes]:
    """A picture of each title's curves, by its alternative text; the axes include `steps`."""
    pictures = {}
    for title, lines in curves.items():
        draw = partial(chart, title=title, lines=lines, colors=colors, steps=steps)
        ends = [
            ", ".join(f"{value:.4g} at step {step}" for step, value in (min(line), max(line))) for line in lines if line
        ]
        pictures[f"{title}: {'; '.join(ends) or 'no values'}"] = svg_panel(draw, WIDTH, HEIGHT, INSIDE)
    return pictures


def stretches(points: Points, n: int) -> list[Points]:
    """Split the points into `n` parts, or fewer if there are fewer points."""
    n = min(len(points), n)
    return [points[i * len(points) // n : (i + 1) * len(points) // n] for i in range(n)]


def chart(axes: Axes, title: str, lines: list[Points], colors: Sequence[str], steps: Sequence[int]) -> None:
    """Draw lines through the means of stretches of steps; of several steps, over a band from minimum to maximum."""
    for points, color in zip(lines, colors, strict=False):
        parts = stretches(points, MAX_POINTS)
        middles = [fmean(step for step, _ in part) for part in parts]
        heights, n = [[value for _, value in part] for part in parts], len(parts)
        if n < len(points):
            axes.fill_between(middles, list(map(min, heights)), list(map(max, heights)), color=color, alpha=0.25, lw=0)
        size = 5 if n == 1 else 3 if color == HELD_OUT_COLOR and n <= MAX_DOTS else 0
        axes.plot(middles, list(map(fmean, heights)), color=color, lw=1.2, marker="o", markersize=size)
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
