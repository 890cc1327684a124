"""`python -m experiments.kv_cache`: what the KV cache saves and costs when the tiny model generates text.

Cells are batch x prompt length x output length, each with the cache and without it. The weights are fp32 on every
device, so that both ways agree in all but the last bits.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.kv_cache_figure import draw
from experiments.kv_cache_report import MIN_EXPONENT_GAP, Line, claims_of, table_of
from experiments.study import Numbers, Options, Study, main
from llama_ft.config import DeviceChoice, UserError
from llama_ft.config.checks import setting

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KVCacheOptions(Options):
    """What this study can be told."""

    complete: bool = setting(False, "every cell: a quarter of an hour for each of the repeats")
    repeats: int = setting(1, "times that everything is timed; the median counts")
    gpu: DeviceChoice = setting(DeviceChoice.cpu, "where to run: cpu, cuda or auto")

    def __post_init__(self) -> None:
        if self.quick and self.complete:
            raise UserError("quick=true and complete=true are two sizes: give one of them")


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    lines: list[Line]
    outputs: tuple[int, ...]  # new tokens of the cells; of a line, those up to its own
    speed: Line  # shows how much faster the cache is
    growth: Line  # shows how time grows with the output
    exponent_gap: float = MIN_EXPONENT_GAP  # that it must show


def plan_of(options: KVCacheOptions) -> Plan:
    """Without the cache a long line takes long, so that a minute has room for one of them."""
    if options.quick:
        speed, growth = Line(1, 768, 16), Line(4, 8, 48)
        return Plan([speed, growth], (8, 16, 48), speed, growth, exponent_gap=0.1)
    longest = Line(1, 96, 512)
    lines = [longest, Line(1, 32, 32), Line(1, 448, 32), Line(4, 96, 32)]
    if options.complete:
        lines = [Line(batch, prompt, 512) for batch in (1, 4) for prompt in (32, 96, 448)]
    return Plan(lines, (32, 128, 512), longest, longest)


def device_of(options: KVCacheOptions) -> "torch.device":
    """The device that was asked for.

    Raises:
        UserError: if it is not there.
    """
    from llama_ft.config import GpuConfig
    from llama_ft.device import choose_device

    return choose_device(GpuConfig(options.gpu.name, device=options.gpu))


def measure(options: KVCacheOptions, log: Callable[[str], None]) -> Numbers:
    """Measure what the plan asks for.

    Raises:
        UserError: if the device is not there.
    """
    from experiments.builtin import CHECKPOINT, load_tiny, prompt_source
    from experiments.kv_cache_lines import measure_line

    plan = plan_of(options)
    model, text, measured = load_tiny(device_of(options)), prompt_source(), []
    for line in plan.lines:
        log(f"batch {line.batch}, prompt of {line.prompt} tokens, {line.new} new ones, with the cache and without")
        measured.append(measure_line(model, text, line, plan.outputs, options.repeats))
    return {
        "repeats": options.repeats,
        "model": {"name": model.config.name, "checkpoint": CHECKPOINT},
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "texts_compared": sum(one["texts_compared"] for one in measured),
        "texts_different": sum(one["texts_different"] for one in measured),
        "fewest_kinds_of_tokens": min(one["fewest_kinds_of_tokens"] for one in measured),
        "speed": vars(plan.speed),
        "growth": vars(plan.growth),
        "exponent_gap": plan.exponent_gap,
        "cells": [cell for one in measured for cell in one["cells"]],
        "curves": [curve for one in measured for curve in one["curves"]],
    }


STUDY = Study("kv_cache", KVCacheOptions, measure, claims_of, table_of, draw, device_of)

if __name__ == "__main__":
    sys.exit(main(STUDY))
