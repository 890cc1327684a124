"""Held-out losses during training: when to measure, which is the best, when to stop."""

import math
import time
from collections.abc import Callable, Iterator, Sequence

from llama_ft.config import TrainingConfig
from llama_ft.config.checks import Diverged
from llama_ft.data.collate import Batch
from llama_ft.records.metrics import EvalMetrics
from llama_ft.system import Log, Pace
from llama_ft.training.loop import Windows
from llama_ft.training.step import TrainStep, evaluate

MAX_NATS = 700.0  # exp of a larger loss overflows a float


def best_of(losses: Sequence[EvalMetrics]) -> EvalMetrics:
    """The first with the lowest loss."""
    return min(losses, key=lambda each: each.eval_loss)


def is_due(step: int, total_steps: int, steps_per_epoch: int, every: int | None) -> bool:
    """Return True if a held-out loss is due: after every `every` steps, or every epoch, and at both ends of the run."""
    return step % (every or steps_per_epoch) == 0 or step == total_steps


def is_time_to_stop(losses: Sequence[EvalMetrics], config: TrainingConfig) -> bool:
    """Return True if `training.patience` losses have come after the best one."""
    if config.patience is None or not losses:
        return False
    return len(losses) - 1 - losses.index(best_of(losses)) >= config.patience


def measure_held_out(
    step: TrainStep, data: Windows, n_steps: int, is_stopped: Callable[[], bool], log: Log
) -> EvalMetrics | None:
    """The held-out loss after `n_steps` optimizer steps; None if stopped, a Diverged if it is not a finite number."""
    start, pace = time.perf_counter(), Pace()

    def until_stopped() -> Iterator[Batch]:
        n_done = 0
        for batch in data.held_out_share():
            if step.ranks.any(is_stopped()):
                return
            yield batch
            n_done += len(batch.tokens) if batch.segments is None else len(batch.segments.lengths)
            if pace.is_due():
                n = min(n_done * step.ranks.world_size, len(data.held_out))
                log(f"held-out loss: {n:,} of {len(data.held_out):,} samples")

    loss, accuracy = evaluate(step, until_stopped())
    if step.ranks.any(is_stopped()):
        return None
    if not loss < MAX_NATS:
        raise Diverged(f"the held-out loss after optimizer step {n_steps} is {loss:g}: lower training.lr")
    return EvalMetrics(n_steps, loss, math.exp(loss), accuracy, round(time.perf_counter() - start, 4))
