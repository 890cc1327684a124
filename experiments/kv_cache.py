"""`python -m experiments.kv_cache`: the savings and costs of the KV cache when the tiny model generates text.

Cells are batch x prompt length x output length, each with and without the cache. The weights are fp32 on every device,
so that both ways agree in all but the last bits.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from experiments.figure import BLUE, GRAY, GREEN, ORANGE, PINK, drawn
from experiments.kv_cache_runs import Line, measure_line
from experiments.shared import load_tiny, prompt_source
from experiments.study import Claim, Log, Numbers, Options, Study, exponent, main, table
from llama_ft.config import DeviceChoice, UserError
from llama_ft.config.checks import check, setting
from llama_ft.kernels import use_kernels_of
from llama_ft.system import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_SPEED_UP = 5.0
MIN_EXPONENT_GAP = 0.3  # of at most 1, for a text much longer than its prompt
MAX_BYTES_APART = 0.02


@dataclass
class KVCacheOptions(Options):
    """Options of this study."""

    complete: bool = setting(False, "measure every cell, in a quarter of an hour per repeat")
    repeats: int = setting(1, "how often everything is timed; the median is reported")
    device: DeviceChoice = setting(DeviceChoice.cpu, "where to run")

    def __post_init__(self) -> None:
        check(self.repeats >= 1, "repeats", self.repeats, "a whole number, at least 1")
        if self.quick and self.complete:
            raise UserError("quick=true and complete=true exclude each other: give one of them")

    def torch_device(self) -> torch.device:
        """The chosen device.

        Raises:
            UserError: if it does not exist.
        """
        has_gpu = torch.cuda.is_available()
        check(has_gpu or self.device is not DeviceChoice.cuda, "device", "cuda", "cpu: PyTorch sees no CUDA GPU here")
        device = torch.device("cuda" if has_gpu and self.device is not DeviceChoice.cpu else "cpu")
        use_kernels_of(device)
        return device


@dataclass(frozen=True)
class Plan:
    """The measurements to make."""

    lines: list[Line]
    outputs: tuple[int, ...]  # new tokens of the cells; a line has those up to its own length
    speed: Line  # shows the speed-up by the cache
    growth: Line  # shows the growth of time with the output
    exponent_gap: float = MIN_EXPONENT_GAP  # the gap that `growth` must show


def plan_of(options: KVCacheOptions) -> Plan:
    """The lines to measure; a long line is so slow without the cache that only one fits in a minute."""
    if options.quick:
        speed, growth = Line(1, 768, 16), Line(4, 8, 48)
        return Plan([speed, growth], (8, 16, 48), speed, growth, exponent_gap=0.1)
    longest = Line(1, 96, 512)
    lines = [longest, Line(1, 32, 32), Line(1, 448, 32), Line(4, 96, 32)]
    if options.complete:
        lines = [Line(batch, prompt, 512) for batch in (1, 4) for prompt in (32, 96, 448)]
    return Plan(lines, (32, 128, 512), longest, longest)


def measure(options: KVCacheOptions, log: Log) -> Numbers:
    """Measure the plan's lines.

    Raises:
        UserError: if the device does not exist.
    """
    plan = plan_of(options)
    model, text, lines = load_tiny(options.torch_device()), prompt_source(), []
    for line in plan.lines:
        log(f"batch {line.batch}, prompt of {line.prompt} tokens, {line.new} new ones, with the cache and without")
        lines.append(measure_line(model, text, line, plan.outputs, options.repeats))
    return {
        "repeats": options.repeats,
        "model": {"name": model.config.name, "checkpoint": "builtin"},
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        **{key: sum(line[key] for line in lines) for key in ("texts_compared", "texts_different")},
        "fewest_kinds_of_tokens": min(line["fewest_kinds_of_tokens"] for line in lines),
        "speed": asdict(plan.speed),
        "growth": asdict(plan.growth),
        "exponent_gap": plan.exponent_gap,
        **{key: [item for line in lines for item in line[key]] for key in ("cells", "curves")},
    }


def claims_of(numbers: Numbers) -> list[Claim]:
    """The claims, checked against the numbers."""
    return [
        _speed_claim(numbers["speed"], numbers["cells"]),
        _growth_claim(numbers["growth"], numbers["curves"], numbers["exponent_gap"]),
        _bytes_claim([cell for cell in numbers["cells"] if cell["kv_cache"]]),
        _text_claim(numbers),
    ]


def _both(items: list[Numbers], **wanted: int) -> tuple[Numbers, Numbers]:
    """The two matching cells, or curves: with and without the cache."""
    matches = [item for item in items if all(item[key] == value for key, value in wanted.items())]
    with_cache, without = sorted(matches, key=lambda item: not item["kv_cache"])
    return with_cache, without


def _power(curve: Numbers) -> float:
    """The power with which time grows, from an eighth of the longest output on: a hiccup distorts shorter ones."""
    points = [(n, s) for n, s in zip(curve["new"], curve["total_s"], strict=True) if 8 * n >= max(curve["new"])]
    return exponent(*zip(*points, strict=True))


def _speed_claim(line: dict[str, int], cells: list[Numbers]) -> Claim:
    with_cache, without = (cell["total_s"] for cell in _both(cells, **line))
    what = f"{line['new']} new tokens after a prompt of {line['prompt']} come at least {MIN_SPEED_UP:g} times as fast"
    numbers = {"times as fast": without / with_cache, "seconds with": with_cache, "seconds without": without}
    return Claim(f"{what} with the cache", without >= MIN_SPEED_UP * with_cache, numbers)


def _growth_claim(line: dict[str, int], curves: list[Numbers], gap: float) -> Claim:
    with_cache, without = map(_power, _both(curves, batch=line["batch"], prompt=line["prompt"]))
    what = "without the cache time grows with a higher power of the output's length"
    numbers = {"exponent with": with_cache, "exponent without": without}
    return Claim(f"{what}, by {gap:g} or more", without - with_cache >= gap, numbers)


def _bytes_claim(cells: list[Numbers]) -> Claim:
    worst = max(abs(cell["cache_bytes"] / cell["closed_form_bytes"] - 1) for cell in cells)
    what = "the cache has the bytes of 2 x layers x kv_heads x head_dim x tokens x bytes x batch"
    numbers = {"cells": len(cells), "percent apart at most": 100 * worst}
    return Claim(f"{what}, within {100 * MAX_BYTES_APART:g} percent", worst <= MAX_BYTES_APART, numbers)


def _text_claim(numbers: Numbers) -> Claim:
    compared, different = numbers["texts_compared"], numbers["texts_different"]
    shown = {"texts": compared, "different": different, "kinds of tokens at least": numbers["fewest_kinds_of_tokens"]}
    return Claim("the text is the same with the cache and without it", compared > 0 and different == 0, shown)


def table_of(numbers: Numbers) -> str:
    """The cells in Markdown, with and without the cache in one row."""
    cells = numbers["cells"]
    titles = ("batch", "prompt", "new", "first token, ms", "then tokens/s", "total, s", "times as fast", "peak, MiB")
    rows = []
    for batch, prompt, new in dict.fromkeys((cell["batch"], cell["prompt"], cell["new"]) for cell in cells):
        with_cache, without = both = _both(cells, batch=batch, prompt=prompt, new=new)
        rows.append(
            [
                *(batch, prompt, new),
                " / ".join(f"{1000 * cell['first_token_s']:,.0f}" for cell in both),
                " / ".join(f"{cell['decode_tokens_per_s']:,.0f}" for cell in both),
                " / ".join(f"{cell['total_s']:,.2f}" for cell in both),
                f"{without['total_s'] / with_cache['total_s']:.1f}",
                " / ".join(f"{cell['peak_memory_bytes'] / MIB:,.1f}" for cell in both),
                *(f"{with_cache[key] / MIB:,.2f}" for key in ("cache_bytes", "closed_form_bytes")),
            ]
        )
    note = "With the cache / without it. Peak: tensors alive at most, weights included."
    return f"{table((*titles, 'cache, MiB', 'formula, MiB'), rows)}\n{note}\n"


def draw(numbers: Numbers, file: Path) -> None:
    """Draw time against the length of the output, and memory against the number of tokens."""
    line = numbers["growth"]
    batch = f", batch {line['batch']}" if line["batch"] > 1 else ""
    with drawn(file, (f"n tokens after a prompt of {line['prompt']}{batch}", "memory of the cache")) as (time, memory):
        _draw_time(time, line, numbers["curves"])
        _draw_memory(memory, [cell for cell in numbers["cells"] if cell["kv_cache"]])
        for axes in (time, memory):
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)


def _draw_time(axes: "Axes", line: dict[str, int], curves: list[Numbers]) -> None:
    """Draw a line's time against the length of its output, and the power with which it grows."""
    both = _both(curves, batch=line["batch"], prompt=line["prompt"])
    for curve, color, name in zip(both, (BLUE, ORANGE), ("with the cache", "without the cache"), strict=True):
        label = f"{name}, as $n^{{{_power(curve):.2f}}}$"
        axes.plot(curve["new"], curve["total_s"], color=color, lw=3, label=label)
    axes.set_xlabel("n, new tokens")
    axes.set_ylabel("total time, s")
    axes.legend(frameon=False, loc="upper left")


def _draw_memory(axes: "Axes", cells: list[Numbers]) -> None:
    """Draw the cache's bytes against the number of tokens it has room for, with the formula as lines."""
    for color, batch in zip((GREEN, PINK), sorted({cell["batch"] for cell in cells}), strict=False):
        ours = {cell["prompt"] + cell["new"]: cell for cell in cells if cell["batch"] == batch}
        end = max(ours)
        height = ours[end]["closed_form_bytes"] / MIB
        axes.plot((0, end), (0, height), color=color, lw=2)
        sizes = [cell["cache_bytes"] / MIB for cell in ours.values()]
        axes.plot(list(ours), sizes, "o", color=color, ms=9, clip_on=False)
        axes.annotate(f"  batch {batch}", (0.7 * end, 0.7 * height), va="top", color=color)
    axes.plot([], [], "o", color=GRAY, ms=9, label="measured")
    axes.plot([], [], color=GRAY, lw=2, label="formula")
    axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel("tokens of a text, prompt and new ones")
    axes.set_ylabel("MiB")


STUDY = Study("kv_cache", KVCacheOptions, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    main(STUDY)
