"""Code shared by the studies' figures: colors, font sizes legible at half size, one PNG."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colors, which color-blind readers can distinguish.
BLUE, ORANGE, GREEN, PINK, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"


@contextmanager
def drawn(file: Path, titles: Sequence[str]) -> Iterator[list["Axes"]]:
    """Axes side by side to draw into, one for each title; written as PNG when the block ends."""
    import matplotlib  # here, so that --help does not wait for it

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 15}):
        figure = Figure(figsize=(6 * len(titles), 5), layout="constrained", dpi=130)
        axes = list(figure.subplots(1, len(titles), squeeze=False)[0])
        for each, title in zip(axes, titles, strict=True):
            each.set_title(title, loc="left")
            each.spines[["top", "right"]].set_visible(False)
        yield axes
        figure.savefig(file, format="png")
