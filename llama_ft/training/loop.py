"""The training loop."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch.optim.lr_scheduler import LRScheduler

from llama_ft.training.metrics import MetricsFile
from llama_ft.training.position import Position
from llama_ft.training.saver import Saver
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
    position: Position,
    metrics: MetricsFile,
    saver: Saver,
    timed: Callable[[], AbstractContextManager[None]],
) -> None:
    """Train from a position to the last epoch's end. Neither preparing an epoch's data nor saving is `timed()`.

    Raises:
        UserError: if a loss is not finite, or a checkpoint cannot be written.
        KeyboardInterrupt: if a stop was requested; the run is saved then.
    """
    step.model.train()
    while position.epoch < epochs:
        windows = epoch_windows(position.epoch)
        while position.window < len(windows):
            until = position.window + saver.steps_to_next(position.step)
            with timed():
                metrics.begin_part()
                for window in windows[position.window : until]:
                    lr = float(schedule.get_last_lr()[0])
                    loss, grad_norm = step(window)
                    schedule.step()
                    metrics.record(loss, grad_norm, lr, sum(batch.n_tokens for batch in window))
                    position.next_step()
                    if saver.stop_requested():
                        break
            saver.save_if_due(position)
        position.next_epoch()
