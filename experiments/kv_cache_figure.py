"""The figure of `experiments.kv_cache`: time against the length of the output, memory against the number of tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.figure import BLUE, GREEN, GREY, ORANGE, PINK, drawn
from experiments.kv_cache_report import exponent
from experiments.study import Numbers
from llama_ft.system import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WITH, WITHOUT = BLUE, ORANGE
BATCHES = (GREEN, PINK)


def draw(numbers: Numbers, file: Path) -> None:
    """Write the figure, PNG."""
    line = numbers["growth"]
    batch = f", batch {line['batch']}" if line["batch"] > 1 else ""
    with drawn(file, (f"n tokens after a prompt of {line['prompt']}{batch}", "memory of the cache")) as (time, memory):
        _draw_time(time, line, numbers["curves"])
        _draw_memory(memory, [cell for cell in numbers["cells"] if cell["kv_cache"]])
        for axes in (time, memory):
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)


def _draw_time(axes: "Axes", line: dict[str, int], curves: list[dict[str, Any]]) -> None:
    """The line's time against the length of its output, and the power with which it grows."""
    for curve in curves:
        if (curve["batch"], curve["prompt"]) == (line["batch"], line["prompt"]):
            colour, name = (WITH, "with the cache") if curve["kv_cache"] else (WITHOUT, "without the cache")
            power = exponent(curve["new"], curve["total_s"])
            axes.plot(curve["new"], curve["total_s"], color=colour, lw=3, label=f"{name}, as $n^{{{power:.2f}}}$")
    axes.set_xlabel("n, new tokens")
    axes.set_ylabel("total time, s")
    axes.legend(frameon=False, loc="upper left")


def _draw_memory(axes: "Axes", cells: list[dict[str, Any]]) -> None:
    """The cache's bytes against the number of tokens it has room for, those of the formula as lines."""
    for colour, batch in zip(BATCHES, sorted({cell["batch"] for cell in cells}), strict=False):
        ours = {cell["prompt"] + cell["new"]: cell for cell in cells if cell["batch"] == batch}
        end = max(ours)
        height = ours[end]["closed_form_bytes"] / MIB
        axes.plot((0, end), (0, height), color=colour, lw=2)
        axes.plot(
            [*ours], [cell["cache_bytes"] / MIB for cell in ours.values()], "o", color=colour, ms=9, clip_on=False
        )
        axes.annotate(f"  batch {batch}", (0.7 * end, 0.7 * height), va="top", color=colour)
    axes.plot([], [], "o", color=GREY, ms=9, label="measured")
    axes.plot([], [], color=GREY, lw=2, label="formula")
    axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel("tokens of a text, prompt and new ones")
    axes.set_ylabel("MiB")
