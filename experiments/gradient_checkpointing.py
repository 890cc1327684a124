"""`python -m experiments.gradient_checkpointing`: memory and forward passes of five ways to keep activations.

The textbook counts n equal layers that keep one tensor each. Here they are linear layers in the library's model, run
and checkpointed by the library; only keeping nothing at all, which nobody would do, is implemented here. LLaMA's own
block, which keeps far more than its input, follows.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figure import BLUE, GRAY, GREEN, ORANGE, PINK, drawn
from experiments.gradient_checkpointing_runs import SQUARES, WAYS, blocks, gradients_apart, textbook
from experiments.study import Claim, Log, Numbers, Options, Study, exponent, main, table
from llama_ft.system import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = dict(zip((*WAYS, "inference"), (ORANGE, GREEN, PINK, BLUE, PINK, GRAY), strict=True))
NO_SAVING = 0.95  # at least this share of the memory for keeping everything
TOLERANCE = 0.1  # largest difference of an exponent from the textbook's


def measure(options: Options, log: Log) -> Numbers:
    """Count all layers and blocks in all ways."""
    return {"textbook": textbook(log), "blocks": blocks(), "gradients_apart": gradients_apart()}


def claims_of(numbers: Numbers) -> list[Claim]:
    """The claims, checked against the numbers."""
    apart = max(numbers["gradients_apart"].values())
    return [
        *_textbook_claims(numbers["textbook"]),
        Claim("each way gives the gradients of the plain one, to the bit", apart == 0, {"largest difference": apart}),
        _block_claim(numbers["blocks"]),
    ]


def _textbook_claims(measured: Numbers) -> list[Claim]:
    n = SQUARES[-1]

    def growth(way: str, memory: float, forwards: float, times: int | None = None) -> tuple[bool, dict[str, float]]:
        """True if exponents are the textbook's and forward passes are `times` n; and the numbers."""
        most = measured[way]["forwards"][-1]
        powers = [exponent(SQUARES, measured[way][key]) for key in ("bytes", "forwards")]
        holds = all(abs(power - law) <= TOLERANCE for power, law in zip(powers, (memory, forwards), strict=True))
        names = ("exponent of memory", "of forward passes", f"forward passes at {n}")
        return holds and times in (None, most / n), dict(zip(names, (*powers, most), strict=True))

    as_plain = measured["one checkpoint"]["bytes"][-1] / measured["keep all"]["bytes"][-1]
    at_once, of_at_once = growth("one checkpoint", 1, 1, times=2)
    return [
        Claim("keep everything: memory O(n), n forward passes", *growth("keep all", 1, 1, times=1)),
        Claim(
            "keep nothing, compute each layer anew from the first input: memory O(1), forward passes O(n^2)",
            *growth("keep none", 0, 2),
        ),
        Claim(
            "keep nothing, compute all anew at once: 2 n forward passes, but memory O(n), nothing saved",
            at_once and as_plain >= NO_SAVING,
            of_at_once | {"times that of keep all": as_plain},
        ),
        Claim(
            "keep every sqrt(n)-th: memory O(sqrt(n)), 2 n forward passes",
            *growth("every sqrt(n)-th", 0.5, 1, times=2),
        ),
        Claim("inference keeps nothing: memory O(1), n forward passes", *growth("inference", 0, 1, times=1)),
    ]


def _block_claim(llama: Numbers) -> Claim:
    ways = llama["ways"]
    every, root = ways["every layer"], ways["every sqrt(n)-th"]
    return Claim(
        "a LLaMA block keeps 10 times its input or more, so that every block, in as many forward passes, needs less"
        " than every sqrt(n)-th",
        llama["times_its_input"] >= 10 and every["bytes"] < root["bytes"] and every["forwards"] == root["forwards"],
        {
            "times its input": llama["times_its_input"],
            "kB, keep all": ways["keep all"]["bytes"] / 1000,
            "every sqrt(n)-th": root["bytes"] / 1000,
            "every block": every["bytes"] / 1000,
        },
    )


def table_of(numbers: Numbers) -> str:
    """Activations and forward passes by method and number of layers."""
    titles = ("kB of activations / forward passes", *(f"n = {n}" for n in SQUARES))
    rows = [
        [way, *(f"{b / 1000:,.0f} / {f:,}" for b, f in zip(counts["bytes"], counts["forwards"], strict=True))]
        for way, counts in numbers["textbook"].items()
    ]
    return table(titles, rows)


def draw(numbers: Numbers, file: Path) -> None:
    """Draw memory and forward passes against the number of layers, and the memory of LLaMA's blocks."""
    titles = ("activations of n layers, kB", "forward passes of n layers", "16 LLaMA blocks, MiB")
    with drawn(file, titles) as (memory, forwards, blocks):
        _draw_growth(memory, numbers["textbook"], "bytes", 1e-3)
        _draw_growth(forwards, numbers["textbook"], "forwards", 1.0)
        ways = ("keep all", "every sqrt(n)-th", "every layer")
        for index, way in enumerate(ways):
            blocks.bar(index, numbers["blocks"]["ways"][way]["bytes"] / MIB, 0.6, color=COLORS[way])
        names = [way.replace("sqrt(n)", r"$\sqrt{n}$").replace("layer", "block") for way in ways]
        blocks.set_xticks(range(len(ways)), names)


def _draw_growth(axes: "Axes", measured: Numbers, key: str, factor: float) -> None:
    """Draw one line for all methods with the same cost."""
    alike: dict[int, list[str]] = {}
    for way in (*WAYS, "inference"):
        last = measured[way][key][-1]
        same = next((other for other in alike if abs(other - last) < 0.01 * last), last)
        alike.setdefault(same, []).append(way)
    for ways in alike.values():
        values = [factor * value for value in measured[ways[0]][key]]
        label = f"{', '.join(ways)}: $n^{{{exponent(SQUARES, values):.2f}}}$".replace("sqrt(n)", r"$\sqrt{n}$")
        axes.plot(SQUARES, values, "o-", color=COLORS[ways[0]], lw=3, ms=9, label=label)
    axes.set(xscale="log", yscale="log", xlabel="n")
    axes.set_xticks(list(SQUARES), [str(n) for n in SQUARES])
    axes.minorticks_off()
    axes.set_ylim(top=axes.get_ylim()[1] * 40)
    axes.legend(frameon=False, loc="upper left", fontsize=12)


STUDY = Study("gradient_checkpointing", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    main(STUDY)
