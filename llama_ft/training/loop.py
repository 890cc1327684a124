"""The training loop."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from llama_ft.training.position import Position
from llama_ft.training.step import TrainStep, Window


class EpochWindows(Protocol):
    """Makes the windows of an epoch, counted from 0, one after the other as they are asked for."""

    def __call__(self, epoch: int, first: int) -> Iterable[Window]:
        """The epoch's optimizer steps in order, from the window `first` on."""
        ...


@dataclass(frozen=True)
class StepOutput:
    """An optimizer step as it leaves the device: reading the tensors waits for it."""

    loss: Tensor  # scalar: mean over the window's target tokens
    grad_norm: Tensor  # scalar: before clipping
    lr: float  # that the step was done with
    n_tokens: int  # of the window, padding not counted


def train(
    step: TrainStep, schedule: LRScheduler, epoch_windows: EpochWindows, epochs: int, position: Position
) -> Iterator[StepOutput]:
    """Train from a position to the end of the last epoch.

    Between two steps the caller may measure, save or stop. `position` is kept up to date.
    """
    step.model.train()
    while position.epoch < epochs:
        for window in epoch_windows(position.epoch, position.window):
            lr = float(schedule.get_last_lr()[0])
            loss, grad_norm = step(window)
            schedule.step()
            position.next_step()
            yield StepOutput(loss, grad_norm, lr, sum(batch.n_tokens for batch in window))
        position.next_epoch()
