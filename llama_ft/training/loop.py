"""The training loop, and the data that it runs over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from llama_ft.data.collate import NO_PADDING, Batch, Padding, collate, epoch_groups, pack
from llama_ft.data.records import Sample
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
    packing: int | None = None  # tokens up to which a window's samples are laid end to end; None leaves them
    pin: bool = False  # whether micro-batches are put into page-locked memory, for a GPU
    held_out: Sequence[Sample] = ()  # to be evaluated, and never trained on

    @classmethod
    def over(
        cls,
        samples: Sequence[Sample],
        step: TrainStep,
        micro_batch_size: int,
        accumulation_steps: int,
        seed: int = 0,
        packing: int | None = None,
        held_out: Sequence[Sample] = (),
    ) -> "Windows":
        """Those of a training step, padded and pinned as its precision and device want them."""
        padding = Padding(step.precision.pad_multiple, step.model.config.max_seq_len)
        pin = step.device.type == "cuda"
        return cls(samples, micro_batch_size, accumulation_steps, seed, padding, packing, pin, held_out)

    def epoch(self, number: int, first: int = 0) -> Iterator[Window]:
        """The windows of an epoch, counted from 0, from the window `first` on; collated as they are asked for."""
        groups = epoch_groups(len(self.samples), self.micro_batch_size, number, self.seed)
        for window in windows(groups[first * self.accumulation_steps :], self.accumulation_steps):
            batches = self.lay_out([[self.samples[index] for index in group] for group in window])
            yield [batch.pinned() if self.pin else batch for batch in batches]

    def lay_out(self, groups: Sequence[Sequence[Sample]]) -> list[Batch]:
        """The micro-batches of a window: a group each, or all of its samples end to end."""
        if self.packing is None:
            return [collate(group, self.padding) for group in groups]
        return pack(list(chain.from_iterable(groups)), self.packing, self.padding)

    def held_out_batches(self) -> Iterator[Batch]:
        """The held-out samples in micro-batches no larger than in training, unless one sample is; longest first."""
        ordered = sorted(self.held_out, key=len, reverse=True)
        room = self.micro_batch_size * max(map(len, self.samples), default=0)  # positions of the widest in training
        while ordered:
            fitting = max(1, min(self.micro_batch_size, room // len(ordered[0])))
            n = fitting if self.packing is None else self.window_size  # of which rows are made
            yield from self.lay_out([ordered[:n]])
            del ordered[:n]

    @property
    def window_size(self) -> int:
        """Samples in a window; the last of an epoch may have fewer."""
        return self.micro_batch_size * self.accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.samples) // self.window_size)


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
