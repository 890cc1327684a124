"""Pages from the templates in this folder, in need of nothing but themselves: the page of a sweep, and its curves."""

import base64
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from llama_ft.config.techniques import combination_label
from llama_ft.records import CATEGORIES
from llama_ft.records.metrics import Metrics, read_metrics
from llama_ft.records.result import CONFIG_FILE, MemoryItem
from llama_ft.reporting.figure import COLOURS, LIMIT_COLOUR, group_panels, limit_in_picture, svg_panel
from llama_ft.reporting.progress import ending
from llama_ft.reporting.results import Group, value_of
from llama_ft.reporting.table import MAIN, MARKS, UNKNOWN, Rows, Table, amount, is_failure

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what a page may not hold, escaped or not
CATEGORY_COLOURS = {category.replace("_", " "): colour for category, colour in COLOURS.items()}
ENDINGS = {"ok": "ok", "oom": "out of memory", "killed": "killed", "interrupted": "interrupted", "error": "failed"}
CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "memory_mib": "memory in use, MiB",
}
MAX_WITH_CURVES = 16  # rows of a table, of three repeats each; with more a page would take minutes and be of no use
MAX_POINTS = 120  # of a curve; its picture is hardly wider
WIDTH, HEIGHT = 2.5, 1.7  # inches
INSIDE = (0.22, 0.25, 0.69, 0.6)  # where the axes are
MIN_SPAN = 0.05  # of the largest value: noise in the fifth figure is not blown up to a mountain

Points = list[tuple[int, float]]  # optimizer step, value


def render(template: str, **values: Any) -> str:
    """A whole page: nothing in the values is taken for markup."""
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["base64"] = lambda content: base64.b64encode(content).decode()
    pages.globals |= {"MAIN": MAIN, "is_failure": is_failure, "LIMIT_COLOUR": LIMIT_COLOUR, "CONFIG_FILE": CONFIG_FILE}
    pages.globals |= {"combination_label": combination_label, "category_colours": CATEGORY_COLOURS}
    pages.globals |= {"breakdown_table": breakdown_table, "versions_text": versions_text}
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", pages.get_template(template).render(values))


def versions_text(versions: dict[str, str | None]) -> str:
    """Names and versions, without those that are not there."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def memory_table(group: Group) -> Table:
    """Each run's memory by category at its peak, and the phase of that."""
    rows: Rows = []
    for result, label in zip(group.results, group.labels, strict=True):
        cells = [*[UNKNOWN] * len(CATEGORIES), MARKS.get(result.status, UNKNOWN), UNKNOWN]
        if memory := value_of(result, "memory_mib"):
            parts = [amount(memory.get(category, 0.0)) for category in CATEGORIES]
            cells = [*parts, amount(sum(memory.values())), result.peak_phase or UNKNOWN]
        rows.append((label, cells))
    return Table("Memory at the peak", [("", [*CATEGORY_COLOURS, "sum", "during"])], rows, [])


def breakdown_table(breakdown: list[MemoryItem]) -> Table:
    """What the memory at the peak consists of, by category and dtype."""
    rows: Rows = []
    for part in sorted(breakdown, key=lambda part: (CATEGORIES.index(part.category), part.dtype)):
        name = part.category.replace("_", " ") + (f" ({part.item})" if part.item else "")
        rows.append((name, [part.dtype, "<0.01" if 0 < part.mib < 0.005 else amount(part.mib)]))
    return Table("Tensors at the peak", [("", ["dtype", "MiB"])], rows, [])


def sweep_page(folder: Path, groups: list[Group], tables: list[Table]) -> str:
    """For each group its table and picture, memory by category, and each run with all that is known of it."""
    title = folder.resolve().name
    statuses = [run.result.status for group in groups for _, run in group.runs]
    counts = [f"{statuses.count(status)} {words}" for status, words in ENDINGS.items() if status in statuses]
    endings = f"{len(statuses)} {'run' if len(statuses) == 1 else 'runs'}: {', '.join(counts)}"
    sections: list[dict[str, Any]] = []
    for group, table in zip(groups, tables, strict=True):
        panels = [svg_panel(draw, 5.2, 0.31 * len(group.results) + 0.7) for draw in group_panels(group)]
        bars = dict(zip(("peak memory by category", "runtime"), panels, strict=True))
        limit = limit_in_picture(group)
        runs, has_few_rows = [], len(group.results) <= MAX_WITH_CURVES
        has_curves = has_few_rows and len(group.runs) <= 3 * MAX_WITH_CURVES
        for number, each in group.runs:
            result, run_dir, label = each.result, each.folder, each.named(group.labels[number])
            shown_dir = Path(title) / run_dir.relative_to(folder)  # however the folder was named on the command line
            config, steps = run_dir / CONFIG_FILE, read_metrics(run_dir) if has_curves else []
            run = {"result": result, "label": label, "folder": shown_dir.as_posix(), "ending": ending(result)}
            curves = {title: [points_of(steps, key)] for key, title in CURVES.items()} if steps else {}
            run["charts"] = charts(curves, ("#0072B2",), [line.step for line in steps]) if has_curves else None
            run["config"] = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None
            runs.append(run)
        section = {"table": table, "bars": bars, "limit": f"limit {limit:,} MiB" if limit is not None else ""}
        sections.append({**section, "memory": memory_table(group), "runs": runs})
    return render("sweep.html.jinja", title=title, endings=endings, sections=sections, max_points=MAX_POINTS)


def points_of(metrics: Sequence[Metrics], key: str) -> Points:
    """(step, value) of each line that has one which is a finite number."""
    values = [(line.step, getattr(line, key, None)) for line in metrics]
    return [(step, value) for step, value in values if value is not None and math.isfinite(value)]


def charts(curves: dict[str, list[Points]], colours: Sequence[str], steps: Sequence[int] = ()) -> dict[str, bytes]:
    """A picture of the curves of each title, over axes that take in `steps`, by what is read aloud of it."""
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
