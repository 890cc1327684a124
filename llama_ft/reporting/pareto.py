"""The Pareto front of memory, time and held-out loss as a picture."""

from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from llama_ft.reporting.best import COSTS, front, measured, members
from llama_ft.reporting.figure import COLORS, Panel, draw_panels
from llama_ft.reporting.results import Group

ON, OFF = COLORS["parameter"], "#BBBBBB"
LONGEST_LABEL = 40  # characters
MOST_LISTED = 12  # runs; a note under the table names them all
LEAST_SPAN = 0.05  # of a cost's axis, as a share of the cost
HEIGHT = 3.4  # inches of a panel


def front_panels(group: Group) -> dict[str, Panel]:
    """Panels of held-out loss over memory and over time, by their titles; none if there are too few runs."""
    shown = [(f"held-out loss over {name}", partial(front_panel, group=group, key=key)) for key, name in COSTS.items()]
    return dict(shown) if measured(group) else {}


def draw_fronts(groups: list[Group], file: Path) -> None:
    """Write the picture of the groups that have a front; if none has, remove an earlier one."""
    shown = [group for group in groups if measured(group)]
    if shown:
        rows = [list(front_panels(group).values()) for group in shown]
        draw_panels(rows, [group.title for group in shown], [HEIGHT] * len(shown), file, same_labels=False)
    else:
        file.unlink(missing_ok=True)


def front_panel(axes: Axes, group: Group, key: str) -> None:
    """Draw a point for each run, numbered if on the front of all three; the line is the front of the panel's two."""
    numbered, column = members(group), list(COSTS).index(key)
    at = {n: (point[column], point[-1]) for n, point in measured(group).items()}
    for n in sorted(at, key=lambda n: n in numbered):
        axes.plot(*at[n], "o", color=ON if n in numbered else OFF, ms=10 if n in numbered else 6, mec="white")
    for number, n in enumerate(numbered, 1):
        axes.annotate(str(number), at[n], color="white", fontsize=7, ha="center", va="center_baseline")
    points = list(at.values())
    line = sorted({points[n] for n in front(points)})
    axes.step([x for x, _ in line], [y for _, y in line], where="post", color=ON, lw=1, alpha=0.5, zorder=1)
    axes.set(xlabel=COSTS[key], ylabel="held-out loss")
    axes.margins(0.1)
    low, high = axes.get_xlim()
    if high - low < LEAST_SPAN * high:  # runs a few bytes apart
        axes.set_xlim(high * (1 - LEAST_SPAN), high * (1 + LEAST_SPAN))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    if column == len(COSTS) - 1:
        names = [f"{number}  {group.labels[n]}" for number, n in enumerate(numbered[:MOST_LISTED], 1)]
        names += [f"{MOST_LISTED + 1} to {len(numbered)}: see the note"] if len(numbered) > MOST_LISTED else []
        names = [name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…" for name in names]
        handles = [Line2D([], [], ls="", marker="o", color=color) for color in [ON] * len(names) + [OFF]]
        handles.append(Line2D([], [], color=ON, lw=1, alpha=0.5))
        names += ["other runs", "best of these two"]
        axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
