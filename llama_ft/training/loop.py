"""The training loop."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch.optim.lr_scheduler import LRScheduler

from llama_ft.training.metrics import MetricsFile
from llama_ft.training.step import TrainStep, Window


class EpochWindows(Protocol):
    """Prepares the windows of an epoch, counted from 0."""

    def __call__(self, epoch: int) -> list[Window]:
        """All of the epoch's optimizer steps, in order."""
        ...


def train(
    step: TrainStep,
    schedule: LRScheduler,
    epoch_windows: EpochWindows,
    epochs: int,
    metrics: MetricsFile,
    timed: Callable[[], AbstractContextManager[None]],
) -> None:
    """Train for some epochs. Each epoch's data is prepared before its part of the time, `timed()`, begins.

    Raises:
        UserError: if a loss is not finite.
    """
    step.model.train()
    for epoch in range(epochs):
        windows = epoch_windows(epoch)
        with timed():
            for window in windows:
                lr = float(schedule.get_last_lr()[0])
                loss, grad_norm = step(window)
                schedule.step()
                metrics.record(loss, grad_norm, lr, sum(batch.n_tokens for batch in window))
