"""A plan as a picture and as a self-contained HTML page."""

import math
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm

from llama_ft.config.checks import Settings, flat
from llama_ft.records import CATEGORIES, shown_categories
from llama_ft.records.plan import Plan, PlanRow
from llama_ft.reporting import figure
from llama_ft.reporting.page import CATEGORY_COLORS, memory_table, render
from llama_ft.reporting.plan_tables import cards, is_at_best, tables_of, title
from llama_ft.reporting.results import baseline_of, planned_group
from llama_ft.reporting.table import MARKS, UNKNOWN

LARGE, SMALL = (5.2, 3.2), (5.2, 2.4)  # inches of a timeline
USABLE = "usable memory of the card"
INSTANT_COLOR = "#777777"
MAX_SIDE_BY_SIDE = 3  # panels in a row of plan.png
MAX_LIMIT_OVER_PEAK = 2  # a limit beyond this multiple of the highest point would flatten a timeline
HEAT_COLORS, MAX_SHARE = "PuOr_r", 2.0  # orange if it does not fit, up to twice the card's memory
DARK_BELOW, DARK_ABOVE = 0.5, 1.6  # shares with colors on which black letters are hard to read


def draw_plan(plan: Plan, file: Path) -> None:
    """Write one picture: for one card memory and runtime, for several the memory of each."""
    panels, one_card = plan_panels(plan), len(plan.gpus) == 1
    rows = [panels[start : start + MAX_SIDE_BY_SIDE] for start in range(0, len(panels), MAX_SIDE_BY_SIDE)]
    heights = [0.4 * len(plan.rows) / len(plan.gpus)] * len(rows)
    figure.draw_panels(rows, [title(plan)], heights, file, (3, 2) if one_card else None, same_labels=one_card)


def plan_panels(plan: Plan) -> list[figure.Panel]:
    """For one card memory and runtime, if a runtime is known; for several the memory of each."""
    several = len(plan.gpus) > 1
    panels: list[figure.Panel] = []
    for gpu in plan.gpus:
        group = planned_group(plan, gpu)
        key = "peak_memory_reserved_mib" if group.on_cuda else "peak_memory_mib"
        name = gpu["name"] if several else ""
        panels.append(partial(figure.memory_panel, group=group, title=name, limit_name=USABLE, key=key))
    if not several and any(row.runtime_s is not None for row in plan.rows):
        xlabel = "runtime, s, at best" if is_at_best(plan) else "runtime, s"
        panels.append(figure.runtime_panel(planned_group(plan, plan.gpus[0]), xlabel))
    return panels


def timeline(axes: Axes, row: PlanRow, limit: float | None, title: str) -> None:
    """Draw areas by category over the step's allocations, and the phases of the step."""
    points = row.timeline
    events = list(range(len(points)))
    stacks = [[point.memory_mib.get(category, 0.0) for point in points] for category in CATEGORIES]
    highest = max(sum(point.memory_mib.values()) for point in points)
    axes.stackplot(events, *stacks, colors=[figure.COLORS[category] for category in CATEGORIES], linewidth=0)
    if limit is not None and limit <= MAX_LIMIT_OVER_PEAK * highest:
        axes.axhline(limit, color=figure.LIMIT_COLOR, linestyle="--")
        highest = max(highest, limit)
    starts = [n for n in events if n == 0 or points[n].phase != points[n - 1].phase]
    for start in starts[1:]:
        axes.axvline(start, color=INSTANT_COLOR, linewidth=0.8)
    middles = [(start + end) / 2 for start, end in zip(starts, [*starts[1:], events[-1]], strict=True)]
    axes.set_xticks(middles, [points[start].phase for start in starts])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, max(1, events[-1]))
    axes.set_ylim(0, 1.05 * highest)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_ylabel("MiB")
    axes.set_title(title, loc="left", fontsize=11)


def heat_map(axes: Axes, plan: Plan, gpus: list[Settings]) -> None:
    """Draw cells of required / available memory in percent, with a mark if it does not fit."""
    lines = list(zip(*(plan.rows_on(gpu["name"]) for gpu in gpus), strict=True))
    shares = [[(row.required_mib or math.nan) / (row.total_memory_mib or math.nan) for row in line] for line in lines]
    axes.imshow(shares, cmap=HEAT_COLORS, norm=TwoSlopeNorm(1.0, 0.0, MAX_SHARE), aspect="auto")
    for y, line in enumerate(lines):
        for x, (row, share) in enumerate(zip(line, shares[y], strict=True)):
            text = MARKS["error"] if row.error else UNKNOWN if math.isnan(share) else f"{share:.0%}"
            text += f" {MARKS['oom']}" if row.fits is False else ""
            is_dark = share <= DARK_BELOW or share >= DARK_ABOVE
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if is_dark else "black")
    axes.set_yticks(range(len(lines)), planned_group(plan, gpus[0]).labels)
    names = [f"{gpu['name']}\n{gpu['memory_mib']:,} MiB" for gpu in gpus]
    axes.set_xticks(range(len(gpus)), names, rotation=35, ha="left", rotation_mode="anchor", fontsize=9)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.set_xticks([x - 0.5 for x in range(1, len(gpus))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(lines))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def plan_page(plan: Plan) -> str:
    """The plan's subject; advice; Table 2 with its pictures; memory over a step; Table 1; the tensors at each peak."""
    tables = tables_of(plan)
    table1 = tables.pop() if plan.table1 else None
    groups = [planned_group(plan, gpu) for gpu in plan.gpus]
    shown = [category.replace("_", " ") for category in shown_categories(row.memory_mib for row in plan.rows)]
    colors = {name: CATEGORY_COLORS[name] for name in shown}
    if any(group.on_cuda for group in groups):
        colors[figure.UNUSED] = figure.RESERVED_COLOR
    has_limit = any(figure.limit_in_picture(group) is not None for group in groups)
    height = 0.31 * len(plan.rows) / len(plan.gpus)
    panels = [figure.svg_panel(draw, 5.2, height + 0.9) for draw in plan_panels(plan)]
    names = [f"memory by category, {gpu['name']}" for gpu in plan.gpus] + ["runtime"]
    known = [gpu for gpu in plan.gpus if gpu["memory_mib"]]
    heat = {}
    if len(known) > 1:
        draw = partial(heat_map, plan=plan, gpus=known)
        heat["memory needed by card"] = figure.svg_panel(draw, 1.9 + 0.85 * len(known), height + 1.3)
    limit, rows = groups[0].memory_limit_mib, plan.rows_on(plan.gpus[0]["name"])
    timelines, other_timelines = _timelines(list(zip(groups[0].labels, rows, strict=True)), limit)
    return render(
        "plan.html.jinja",
        plan=plan,
        title=title(plan),
        cards=cards(plan),
        settings=_shared(plan),
        tables=tables,
        table1=table1,
        heat_map=heat,
        bars=dict(zip(names, panels, strict=False)),  # no runtime for several cards, or without rates
        bar_colors=colors,
        bar_limit=f"{USABLE}: all but the CUDA context" if has_limit else "",
        timelines=timelines,
        other_timelines=other_timelines,
        timeline_limit=USABLE if limit is not None else "",
        memory=memory_table(groups[0]),
        breakdowns=[(label, row.breakdown) for label, row in zip(groups[0].labels, rows, strict=True) if row.breakdown],
    )


def _shared(plan: Plan) -> dict[str, str]:
    """The settings that all rows share; of training, those of the pass over the data."""
    training = {key: plan.training.get(key) for key in ("micro_batch_size", "packing", "epochs")}
    sections = {"Training": training, "Techniques": flat(plan.techniques)}
    own = {key.removeprefix("training.") for key in plan.rows[0].settings}
    return {
        name: ", ".join(
            f"{key}={value}".replace("'", "") for key, value in section.items() if value is not None and key not in own
        )
        for name, section in sections.items()
    }


def _timelines(rows: list[tuple[str, PlanRow]], limit: float | None) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The timelines by label: large ones of the baseline and the smallest row, small ones of the others."""
    drawn = [(label, row) for label, row in rows if not row.error and len(row.timeline) > 1]
    possible = [row for _, row in drawn]
    fitting = [row for row in possible if row.fits is not False] or possible[:1]
    smallest = min(fitting, key=lambda row: row.required_mib or row.peak_memory_mib or 0.0, default=None)
    keys = {row.key for row in (baseline_of(possible), smallest) if row is not None}
    pictures: tuple[dict[str, bytes], dict[str, bytes]] = {}, {}
    for label, row in drawn:
        is_small = row.key not in keys
        draw = partial(timeline, row=row, limit=limit, title=label)
        panel = figure.svg_panel(draw, *(SMALL if is_small else LARGE))
        pictures[is_small][f"memory over a step, {label}"] = panel
    return pictures
