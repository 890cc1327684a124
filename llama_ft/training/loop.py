"""The training loop, and the data that it runs over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from llama_ft.data.collate import NO_PADDING, Padding, epoch_batches
from llama_ft.data.dataset import Sample
from llama_ft.techniques.gradient_accumulation import windows
from llama_ft.training.position import Position
from llama_ft.training.step import TrainStep, Window


@dataclass(frozen=True)
class Windows:
    """The data as optimizer steps: windows of micro-batches, in an order that depends on seed and epoch alone."""

    samples: Sequence[Sample]
    micro_batch_size: int = 1
    accumulation_steps: int = 1
    seed: int = 0
    padding: Padding = NO_PADDING
    pin: bool = False  # whether micro-batches are put into page-locked memory, for a GPU

    @classmethod
    def over(
        cls, samples: Sequence[Sample], step: TrainStep, micro_batch_size: int, accumulation_steps: int, seed: int = 0
    ) -> "Windows":
        """Those of a training step, padded and pinned as its precision and device want them."""
        padding = Padding(step.precision.pad_multiple, step.model.config.max_seq_len)
        return cls(samples, micro_batch_size, accumulation_steps, seed, padding, step.device.type == "cuda")

    def epoch(self, number: int, first: int = 0) -> Iterator[Window]:
        """The windows of an epoch, counted from 0, from the window `first` on; collated as they are asked for."""
        first_batch = first * self.accumulation_steps
        batches = epoch_batches(self.samples, self.micro_batch_size, number, self.seed, self.padding, first_batch)
        return windows((batch.pinned() if self.pin else batch for batch in batches), self.accumulation_steps)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        n_micro_batches = -(-len(self.samples) // self.micro_batch_size)
        return -(-n_micro_batches // self.accumulation_steps)


@dataclass(frozen=True)
class StepOutput:
    """An optimizer step as it leaves the device: reading the tensors waits for it."""

    loss: Tensor  # scalar: mean over the window's target tokens
    grad_norm: Tensor  # scalar: before clipping
    lr: float  # that the step was done with
    n_tokens: int  # of the window, padding not counted


def train(
    step: TrainStep, schedule: LRScheduler, data: Windows, epochs: int, position: Position
) -> Iterator[StepOutput]:
    """Train from a position to the end of the last epoch.

    Between two steps the caller may measure, save or stop. `position` is kept up to date.
    """
    step.model.train()
    while position.epoch < epochs:
        for window in data.epoch(position.epoch, position.window):
            lr = float(schedule.get_last_lr()[0])
            loss, grad_norm = step(window)
            schedule.step()
            position.window, position.step = position.window + 1, position.step + 1
            yield StepOutput(loss, grad_norm, lr, sum(batch.n_tokens for batch in window))
        position.epoch, position.window = position.epoch + 1, 0
