"""What the studies' figures share: colours, sizes that can be read at half size, one PNG."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"


@contextmanager
def drawn(file: Path, titles: Sequence[str]) -> Iterator[list["Axes"]]:
    """Axes side by side, one for each title, to be drawn into; written as PNG when the block ends."""
    import matplotlib  # here, so that nobody waits for it who asks for help

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
