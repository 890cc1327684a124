"""Curves over a run's optimizer steps, as small SVG pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "memory_mib": "memory in use, MiB",
}
PAIR_COLOURS = {"A": "#999999", "B": "#0072B2"}  # of two sweeps
MAX_POINTS = 200  # of a curve; its picture is hardly wider
WIDTH, HEIGHT = 240, 150
LEFT, RIGHT, TOP, BOTTOM = 54, 232, 28, 114  # of the axes in that picture
LETTER_WIDTH = 8
MIN_SPAN = 0.05  # of the largest value: noise in the fifth figure is not blown up to a mountain

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve of a picture."""

    name: str  # its class in the page's style: `a`, `b`, or empty
    points: Points  # (optimizer step, value)


def points_of(metrics: list[dict[str, Any]], key: str) -> Points:
    """(step, value) of each step whose value is a finite number."""
    values = [(line["step"], line.get(key)) for line in metrics]
    return [(step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]


def stretches(points: Points) -> list[Points]:
    """The points, in order, in at most MOST_POINTS parts of about the same length."""
    n = min(len(points), MAX_POINTS)
    return [points[i * len(points) // n : (i + 1) * len(points) // n] for i in range(n)]


def run_charts(metrics: list[dict[str, Any]]) -> str:
    """A picture for each of CURVES, all over the same steps."""
    steps = [line["step"] for line in metrics]
    return "".join(chart(title, [Line("", points_of(metrics, key))], steps) for key, title in CURVES.items())


def chart(title: str, lines: list[Line], steps: Sequence[int] = ()) -> str:
    """A picture of curves over the optimizer step, with axes that take in `steps`."""
    every = [point for line in lines for point in line.points]
    heading = f'<text x="4" y="14" class="title">{escape(title)}</text>'
    spoken = f"{title}, no values"
    if every:
        begin, end = min(every), max(every)
        first, last = min([begin[0], *steps]), max([end[0], *steps])
        low, high = _widened(min(y for _, y in every), max(y for _, y in every))
        inside = _axes(first, last, low, high) + "".join(_curve(line, first, last, low, high) for line in lines)
        spoken = f"{title}: {begin[1]:.4g} at step {begin[0]}, {end[1]:.4g} at step {end[0]}"
    else:
        inside = f'<text x="{(LEFT + RIGHT) / 2:g}" y="{(TOP + BOTTOM) / 2:g}" class="none">no values</text>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">'
        f"{heading}{inside}</svg>\n"
    )


def _widened(low: float, high: float) -> tuple[float, float]:
    least = MIN_SPAN * max(abs(low), abs(high)) or 1.0
    missing = max(0.0, least - (high - low)) / 2
    return low - missing, high + missing


def _x(step: float, first: float, last: float) -> float:
    return (LEFT + RIGHT) / 2 if first == last else LEFT + (RIGHT - LEFT) * (step - first) / (last - first)


def _y(value: float, low: float, high: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)


def _curve(line: Line, first: float, last: float, low: float, high: float) -> str:
    """A line through the means of the stretches; where they hold several steps, over a band from least to greatest."""

    def place(x: float, y: float) -> str:
        return f"{_x(x, first, last):.1f},{_y(y, low, high):.1f}"

    parts = [([x for x, _ in part], [y for _, y in part]) for part in stretches(line.points)]
    steps = [fmean(xs) for xs, _ in parts]
    name = f' class="{line.name}"' if line.name else ""
    band = ""
    if len(line.points) > len(parts):
        above = [place(x, max(ys)) for x, (_, ys) in zip(steps, parts, strict=True)]
        below = [place(x, min(ys)) for x, (_, ys) in zip(steps, parts, strict=True)]
        band = f'<polygon{name} points="{" ".join(above + below[::-1])}"/>'
    places = [place(x, fmean(ys)) for x, (_, ys) in zip(steps, parts, strict=True)]
    if len(places) == 1:
        x, y = places[0].split(",")
        return f'<circle{name} cx="{x}" cy="{y}" r="3"/>'
    return f'{band}<polyline{name} points="{" ".join(places)}"/>' if places else ""


def _axes(first: float, last: float, low: float, high: float) -> str:
    parts = [f'<path d="M{LEFT} {TOP - 6}V{BOTTOM + 6}H{RIGHT}"/>']
    for value, label in ticks(low, high, 5):
        y = _y(value, low, high)
        parts.append(f'<path d="M{LEFT} {y:.1f}h-4"/><text x="{LEFT - 7}" y="{y + 4:.1f}" class="y">{label}</text>')
    for value, label in ticks(first, last, 5, whole=True):
        x = _x(value, first, last)
        middle = min(x, WIDTH - LETTER_WIDTH * len(label) / 2)  # a text at the right end stays inside
        parts.append(f'<path d="M{x:.1f} {BOTTOM + 6}v4"/>')
        parts.append(f'<text x="{middle:.1f}" y="{BOTTOM + 21}" class="x">{label}</text>')
    parts.append(f'<text x="{RIGHT}" y="{HEIGHT - 3}" class="y">optimizer step</text>')
    return "".join(parts)


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[tuple[float, str]]:
    """At most so many round values from low to high, with their texts; whole numbers only if `whole`."""
    if low == high:
        return [(low, f"{low:,g}")]
    power = math.floor(math.log10((high - low) / most))
    steps = [factor * 10.0**p for p in (power, power + 1) for factor in (1, 2, 5)]
    fitting = (s for s in steps if math.floor(high / s) - math.ceil(low / s) < most and (s % 1 == 0 or not whole))
    step = next(fitting, 10.0 ** (power + 2))
    values = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    if max(abs(low), abs(high)) < 1e-3:
        return [(value, f"{value:.3g}") for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(value, f"{value:,.{decimals}f}") for value in values]
