"""`metrics.jsonl`: a line for each optimizer step, followed by one for the held-out loss after that step, if any."""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from llama_ft.records import parse

METRICS_FILE = "metrics.jsonl"
FLUSH_SECONDS = 0.25


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step."""

    step: Annotated[int, Field(ge=1, lt=2**53)]  # counted from 1
    total_steps: int
    loss: float  # mean over the step's target tokens, in nats
    grad_norm: float | None  # before clipping; None if it was not finite and the step was skipped
    lr: float
    tokens: int  # so far, padding not counted
    tokens_per_s: float  # of this step
    memory_mib: float  # in use after the step
    time_s: float  # of training so far


@dataclass(frozen=True)
class EvalMetrics:
    """An evaluation on the held-out samples, without dropout."""

    step: Annotated[int, Field(ge=0, lt=2**53)]  # optimizer steps done before it
    eval_loss: float  # mean over all target tokens, in nats
    eval_perplexity: float
    eval_token_accuracy: float  # share of the target tokens that the model finds most probable
    eval_time_s: float


Metrics = StepMetrics | EvalMetrics


def line_of(metrics: Metrics) -> str:
    """Format a line of the file."""
    return json.dumps(vars(metrics)) + "\n"


def parse_line(text: bytes | str, where: str) -> Metrics:
    """Parse a line; a UserError if it is damaged."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and "eval_loss" in content:
        return parse(EvalMetrics, content, where)
    return parse(StepMetrics, content, where)


def steps_of(metrics: Iterable[Metrics]) -> list[StepMetrics]:
    """Only the optimizer steps."""
    return [each for each in metrics if isinstance(each, StepMetrics)]


def evaluations_of(metrics: Iterable[Metrics]) -> list[EvalMetrics]:
    """Only the held-out losses."""
    return [each for each in metrics if isinstance(each, EvalMetrics)]


def read_metrics(run_dir: Path) -> list[Metrics]:
    """Read the lines of a run, without a last one that was cut short; a UserError names any other damaged line."""
    file = run_dir / METRICS_FILE
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [parse_line(text, f"{file}, line {number}") for number, text in enumerate(lines, 1)]


class MetricsFile:
    """The file of a run while it is written; a resumed run appends to the lines that are there."""

    def __init__(self, file: Path, writes: bool = True) -> None:
        """With `writes` lines reach the disk: of several processes one writes, and the others only collect."""
        self.lines = read_metrics(file.parent)
        written = file if writes else Path(os.devnull)
        self._stream = written.open("a", encoding="utf-8")
        if writes:
            os.utime(file)  # tells our parent that training begins
        self._last_flush = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, metrics: Metrics | None) -> None:
        """Add a line, unless it is None. Lines reach the disk a few times a second."""
        if metrics is None:
            return
        self.lines.append(metrics)
        self._stream.write(line_of(metrics))
        if (now := time.monotonic()) - self._last_flush > FLUSH_SECONDS:
            self._stream.flush()
            self._last_flush = now

    def sync(self) -> None:
        """Write all lines to the disk."""
        self._stream.flush()
        if self._stream.name != os.devnull:
            os.fsync(self._stream.fileno())
