"""`python -m experiments.gradient_checkpointing`: memory and forward passes of five ways to keep activations.

The textbook counts n equal layers, each of which keeps one tensor. Here they are linear layers in the library's model,
run and checkpointed by the library; only to keep nothing at all, which nobody would do, is written here. Then LLaMA's
own block, which keeps far more than its input.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

from experiments.figure import BLUE, GREEN, GREY, ORANGE, PINK, drawn
from experiments.study import Claim, Numbers, Options, Study, main, table
from llama_ft.system import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SQUARES = (16, 36, 64, 144, 256)  # numbers of layers that have a square root
WAYS: dict[str, Callable[[int], int | None]] = {
    "keep all": lambda n: 0,
    "keep none": lambda n: None,
    "one checkpoint": lambda n: n,
    "every sqrt(n)-th": math.isqrt,
    "every layer": lambda n: 1,
}
"""Of n layers: from how many of them one input is kept; 0 keeps everything, None the first input alone."""
COLOURS = dict(zip((*WAYS, "inference"), (ORANGE, GREEN, PINK, BLUE, PINK, GREY), strict=True))
NO_SAVING = 0.95  # share of what keeping everything takes, or more
NEAR = 0.1  # how far an exponent may be from the textbook's


def exponent(values: Sequence[float]) -> float:
    """The power of n with which the values grow: the slope of a line through them on logarithmic axes."""
    return linear_regression([math.log(n) for n in SQUARES], [math.log(value) for value in values]).slope


def claims_of(numbers: Numbers) -> list[Claim]:
    """What the numbers say of each claim."""
    measured, llama, n = numbers["textbook"], numbers["blocks"], SQUARES[-1]
    power = {way: {key: exponent(each[key]) for key in ("bytes", "forwards")} for way, each in measured.items()}
    most = {way: each["forwards"][-1] for way, each in measured.items()}

    def growth(way: str, memory: float, forwards: float, times: int | None = None) -> tuple[bool, dict[str, float]]:
        """Whether exponents are the textbook's, and forward passes so many times n; and what was found."""
        found = {"exponent of memory": power[way]["bytes"], "of forward passes": power[way]["forwards"]}
        near = all(abs(one - other) <= NEAR for one, other in zip(found.values(), (memory, forwards), strict=True))
        return near and times in (None, most[way] / n), found | {f"forward passes at {n}": most[way]}

    as_plain = measured["one checkpoint"]["bytes"][-1] / measured["keep all"]["bytes"][-1]
    at_once, found = growth("one checkpoint", 1, 1, times=2)
    every, root = (llama["ways"][way] for way in ("every layer", "every sqrt(n)-th"))
    apart = max(numbers["gradients_apart"].values())
    return [
        Claim("keep everything: memory O(n), n forward passes", *growth("keep all", 1, 1, times=1)),
        Claim(
            "keep nothing, compute each layer anew from the first input: memory O(1), forward passes O(n^2)",
            *growth("keep none", 0, 2),
        ),
        Claim(
            "keep nothing, compute all anew at once: 2 n forward passes, but memory O(n), nothing saved",
            at_once and as_plain >= NO_SAVING,
            found | {"times that of keep all": as_plain},
        ),
        Claim(
            "keep every sqrt(n)-th: memory O(sqrt(n)), 2 n forward passes",
            *growth("every sqrt(n)-th", 0.5, 1, times=2),
        ),
        Claim("inference keeps nothing: memory O(1), n forward passes", *growth("inference", 0, 1, times=1)),
        Claim("each way gives the gradients of the plain one, to the bit", apart == 0, {"largest difference": apart}),
        Claim(
            "a LLaMA block keeps 10 times its input or more, so that every block, in as many forward passes, needs less"
            " than every sqrt(n)-th",
            llama["times_its_input"] >= 10 and every["bytes"] < root["bytes"] and every["forwards"] == root["forwards"],
            {
                "times its input": llama["times_its_input"],
                "kB, keep all": llama["ways"]["keep all"]["bytes"] / 1000,
                "every sqrt(n)-th": root["bytes"] / 1000,
                "every block": every["bytes"] / 1000,
            },
        ),
    ]


def table_of(numbers: Numbers) -> str:
    """Activations and forward passes by way and number of layers."""
    titles = ("kB of activations / forward passes", *(f"n = {n}" for n in SQUARES))
    rows = [
        [way, *(f"{b / 1000:,.0f} / {f:,}" for b, f in zip(each["bytes"], each["forwards"], strict=True))]
        for way, each in numbers["textbook"].items()
    ]
    return table(titles, rows)


def draw(numbers: Numbers, file: Path) -> None:
    """Memory and forward passes against the number of layers; memory of LLaMA's blocks."""
    titles = ("activations of n layers, kB", "forward passes of n layers", "16 LLaMA blocks, MiB")
    with drawn(file, titles) as (memory, forwards, blocks):
        _draw_growth(memory, numbers["textbook"], "bytes", 1e-3)
        _draw_growth(forwards, numbers["textbook"], "forwards", 1.0)
        ways = ("keep all", "every sqrt(n)-th", "every layer")
        for place, way in enumerate(ways):
            blocks.bar(place, numbers["blocks"]["ways"][way]["bytes"] / MIB, 0.6, color=COLOURS[way])
        names = [way.replace("sqrt(n)", r"$\sqrt{n}$").replace("layer", "block") for way in ways]
        blocks.set_xticks(range(len(ways)), names)


def _draw_growth(axes: "Axes", found: dict[str, Any], key: str, factor: float) -> None:
    """Ways that take the same are one line."""
    alike: dict[int, list[str]] = {}
    for way in (*WAYS, "inference"):
        last = found[way][key][-1]
        same = next((other for other in alike if abs(other - last) < 0.01 * last), last)
        alike.setdefault(same, []).append(way)
    for ways in alike.values():
        values = [factor * value for value in found[ways[0]][key]]
        label = f"{', '.join(ways)}: $n^{{{exponent(values):.2f}}}$".replace("sqrt(n)", r"$\sqrt{n}$")
        axes.plot(SQUARES, values, "o-", color=COLOURS[ways[0]], lw=3, ms=9, label=label)
    axes.set(xscale="log", yscale="log", xlabel="n")
    axes.set_xticks(list(SQUARES), [str(n) for n in SQUARES])
    axes.minorticks_off()
    axes.set_ylim(top=axes.get_ylim()[1] * 40)
    axes.legend(frameon=False, loc="upper left", fontsize=12)


def measure(options: Options, log: Callable[[str], None]) -> Numbers:
    """Count, all layers and blocks in all ways."""
    from experiments.gradient_checkpointing_runs import blocks, gradients_apart, textbook

    return {"textbook": textbook(log), "blocks": blocks(), "gradients_apart": gradients_apart()}


STUDY = Study("gradient_checkpointing", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    sys.exit(main(STUDY))
