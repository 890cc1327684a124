"""Pictures of memory and runtime: PNG files with the panels side by side; for a page each panel as SVG."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from llama_ft.files import whole_file
from llama_ft.records import CATEGORIES, shown_categories
from llama_ft.records.result import Result
from llama_ft.reporting.repeats import spread_of, values_of
from llama_ft.reporting.results import Group, value_of
from llama_ft.reporting.table2 import cell

# Okabe and Ito's colors, which color-blind readers can tell apart too.
COLORS = dict(zip(CATEGORIES, ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#999999"), strict=True))
RUNTIME_COLOR, LIMIT_COLOR, FAILED_COLOR, RESERVED_COLOR = "#555555", "#D55E00", "#B3261E", "#D9D9D9"
SIDE_COLORS = ("#999999", "#0072B2")  # of a comparison
UNUSED = "reserved, not in use"
SPREAD_COLOR, SPREAD, EACH_RUN = "black", "95 % interval of the mean", "each run"
DOTS = 0.5  # of a bar's height, over which the dots of its runs are spread
MAX_LIMIT_OVER_PEAK = 4  # a limit beyond this multiple of the largest peak would leave no visible bars
MARGIN = 0.1  # above and below the bars, in rows
LABEL_WIDTH = 60  # characters in a line of a label
COORDINATE = re.compile(rb"(\d\.\d)\d+")

Panel = Callable[[Axes], None]


@contextmanager
def drawing() -> Iterator[None]:
    """Draw texts literally, without formulas, and without warnings about letters that the font lacks."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcParams |= {"text.parse_math": False, "font.sans-serif": ["DejaVu Sans"]}
        matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "llama_ft"}
        matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def group_panels(group: Group) -> list[Panel]:
    """Memory and runtime of a group."""
    return [partial(memory_panel, group=group), runtime_panel(group)]


def runtime_panel(group: Group, xlabel: str = "runtime, s") -> Panel:
    """Runtimes as bars."""
    sides = [(group.results, RUNTIME_COLOR, None)]
    return partial(bars, labels=group.labels, sides=sides, key="runtime_s", xlabel=xlabel)


def pair_panels(a: Group, b: Group, names: Sequence[str]) -> list[Panel]:
    """Memory and runtime of two groups of the same combinations."""
    sides = list(zip((a.results, b.results), SIDE_COLORS, names, strict=True))
    measures = (("peak_memory_mib", "peak memory, MiB"), ("runtime_s", "runtime, s"))
    return [partial(bars, labels=a.labels, sides=sides, key=key, xlabel=xlabel) for key, xlabel in measures]


def draw_panels(
    rows: Sequence[Sequence[Panel]],
    titles: Sequence[str],  # of the rows, or one of the whole picture
    heights: Sequence[float],  # of the rows' bars, in inches
    file: Path,
    width_ratios: Sequence[float] | None = None,
    same_labels: bool = True,  # the panels of a row share the names next to the first
) -> None:
    """Write one picture with rows of panels, and one legend for all."""
    n_columns = max(2, *map(len, rows))
    with drawing():
        size = 10 if n_columns == 2 else 5 * n_columns, sum(heights) + 0.9 * len(rows) + 0.5
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        axes = figure.subplots(len(rows), n_columns, squeeze=False, width_ratios=width_ratios, height_ratios=heights)
        for panels, row in zip(rows, axes, strict=True):
            for n, (draw, panel) in enumerate(zip_longest(panels, row)):
                panel.set_visible(draw is not None)
                if draw is not None:
                    draw(panel)
                if same_labels and n > 0:
                    panel.set_yticklabels([])
        if len(titles) == 1:
            figure.suptitle(textwrap.fill(titles[0], 110), x=0.01, ha="left", fontsize=11)
        else:
            for title, row in zip(titles, axes, strict=True):
                row[0].set_title(textwrap.fill(title, 100), loc="left", fontsize=10)
        legends = chain(*(zip(*panel.get_legend_handles_labels(), strict=True) for panel in axes.ravel()))
        handles = {name: handle for handle, name in sorted(legends, key=lambda entry: isinstance(entry[0], Line2D))}
        ncols = 1 if len(handles) == 2 else 6 if len(handles) <= 6 else 4
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower left", ncols=ncols, frameon=False, columnspacing=1.2
        )
        with whole_file(file) as temporary:
            figure.savefig(temporary, format="png")


def svg_panel(
    draw: Panel, width: float, height: float, inside: tuple[float, float, float, float] | None = None
) -> bytes:
    """Draw a panel in a picture of this size in inches, as SVG.

    The axes are `inside` (left, bottom, width, height as shares), or fitted to their texts, which takes longer.
    """
    with drawing():
        figure = Figure(figsize=(width, height), layout=None if inside else "constrained")
        draw(figure.add_axes(inside) if inside else figure.subplots())
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    # Six decimals of a coordinate, and rotations by 0, are most of such a file.
    svg = re.sub(rb' transform="rotate\(-0 [^"]*"', b"", out.getvalue().replace(b" \n", b"\n"))
    return re.sub(rb' d="[^"]*"', lambda path: COORDINATE.sub(rb"\1", path[0]), svg)


def limit_in_picture(group: Group) -> int | None:
    """The limit that the memory panel shows, if it is meaningful and leaves room for the bars."""
    # On the CPU it limits the whole process, not its tensors.
    limit = group.memory_limit_mib
    largest = max(value_of(result, "peak_memory_mib") or 0.0 for result in group.results)
    return limit if limit is not None and group.on_cuda and limit <= MAX_LIMIT_OVER_PEAK * largest else None


def memory_panel(
    axes: Axes, group: Group, limit_name: str = "limit {:,} MiB", key: str = "peak_memory_mib", title: str = ""
) -> None:
    """Draw bars by category, reserved memory beyond them if `key` is that, and the limit."""
    results = group.results
    ends = [0.0] * len(results)

    def stack(sizes: list[float], color: str, name: str) -> None:
        axes.barh(range(len(results)), sizes, left=ends, color=color, label=name, height=0.7)
        ends[:] = [end + size for end, size in zip(ends, sizes, strict=True)]

    memories = [value_of(result, "memory_mib") or {} for result in results]
    for category in shown_categories(memories):
        stack([each.get(category, 0.0) for each in memories], COLORS[category], category.replace("_", " "))
    if key == "peak_memory_reserved_mib":
        beyond = [max(0.0, (value_of(r, key) or 0.0) - end) for r, end in zip(results, ends, strict=True)]
        stack(beyond, RESERVED_COLOR, UNUSED)
    if (limit := limit_in_picture(group)) is not None:
        axes.axvline(limit, color=LIMIT_COLOR, linestyle="--", label=limit_name.format(limit))
    show_spread(axes, results, key)
    annotate(axes, results, key)
    finish(axes, group.labels, "peak memory, MiB" if key == "peak_memory_mib" else "reserved memory, MiB")
    axes.set_title(title, loc="left", fontsize=11)


def bars(
    axes: Axes, labels: list[str], sides: Sequence[tuple[list[Result], str, str | None]], key: str, xlabel: str
) -> None:
    """Draw a bar for each label, or one below the other for two sides, each with its results, color and name."""
    offsets, height = ((0.0,), 0.7) if len(sides) == 1 else ((-0.2, 0.2), 0.38)
    for offset, (results, color, name) in zip(offsets, sides, strict=True):
        positions = [position + offset for position in range(len(results))]
        axes.barh(positions, [value_of(r, key) or 0.0 for r in results], color=color, height=height, label=name)
        show_spread(axes, results, key, offset, height)
        annotate(axes, results, key, offset)
    finish(axes, labels, xlabel)


def show_spread(axes: Axes, results: list[Result], key: str, offset: float = 0.0, height: float = 0.7) -> None:
    """If repeats differ, draw the confidence interval of their mean as an error bar, and each run as a dot."""
    for position, result in enumerate(results):
        if (spread := spread_of(result, key)) is None:
            continue
        values = values_of(result, key)
        across = [position + offset + height * DOTS * (n / (len(values) - 1) - 0.5) for n in range(len(values))]
        middle = float(value_of(result, key)), position + offset
        for color, width, name in (("white", 3.5, ""), (SPREAD_COLOR, 1.3, SPREAD)):  # visible on dark bars too
            lines = partial(axes.errorbar, fmt="none", ecolor=color, elinewidth=width, capthick=width, label=name)
            lines(*middle, xerr=spread, capsize=3, zorder=3)
        axes.plot(values, across, "o", mfc="white", mec=SPREAD_COLOR, markersize=3.5, zorder=4, label=EACH_RUN)


def annotate(axes: Axes, results: list[Result], key: str, offset: float = 0.0) -> None:
    """Write a bar's value at its end; for a failed run its mark where the bar would begin."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the limit's line
    for position, result in enumerate(results):
        end = max([(value_of(result, key) or 0.0) + (spread_of(result, key) or 0.0), *values_of(result, key)])
        color = "black" if result.status == "ok" else FAILED_COLOR
        text = axes.annotate(cell(result, key), (end, position + offset), (4, 0), textcoords="offset points", bbox=box)
        text.set(color=color, verticalalignment="center_baseline", fontsize=10)


def finish(axes: Axes, labels: list[str], xlabel: str) -> None:
    """Set the labels and axes, as in all panels of bars."""
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, LABEL_WIDTH) for label in labels])
    axes.set_ylim(len(labels) - 0.5 + MARGIN, -0.5 - MARGIN)
    axes.margins(x=max(0.24, 0.04 * max((len(text.get_text()) for text in axes.texts), default=0)))  # room for them
    if axes.dataLim.xmax > 0:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.set(xlim=(0, 1), xticks=[])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel(xlabel)
