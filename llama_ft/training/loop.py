"""The training loop and its data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from llama_ft.config import TrainingConfig
from llama_ft.data.collate import NO_PADDING, Batch, Padding, collate, end_to_end, epoch_groups, no_samples, rows_of
from llama_ft.data.records import Samples
from llama_ft.parallel.ranks import ALONE, Ranks
from llama_ft.techniques.gradient_accumulation import windows
from llama_ft.training.position import Position
from llama_ft.training.step import TrainStep, Window


@dataclass(frozen=True)
class Windows:
    """The data as windows of micro-batches, one per optimizer step, in an order set only by seed and epoch."""

    samples: Samples
    micro_batch_size: int = 1
    accumulation_steps: int = 1
    seed: int = 0
    padding: Padding = NO_PADDING
    packing: int | None = None  # a window's samples are packed into rows of up to this many tokens; None: not packed
    pin: bool = False  # put micro-batches into page-locked memory, for a GPU
    held_out: Samples = ()  # evaluated, never trained on
    ranks: Ranks = ALONE  # the processes that share a window

    @classmethod
    def over(
        cls,
        samples: Samples,
        step: TrainStep,
        config: TrainingConfig,
        accumulation_steps: int = 1,
        held_out: Samples = (),
    ) -> "Windows":
        """The windows for a training step, padded and pinned for its precision and device."""
        padding, pin = Padding(step.precision.pad_multiple, step.model.config.max_seq_len), step.device.type == "cuda"
        size, seed, packing = config.micro_batch_size, config.seed, config.packing
        return cls(samples, size, accumulation_steps, seed, padding, packing, pin, held_out, step.ranks)

    def epoch(self, number: int, first: int = 0) -> Iterator[Window]:
        """This process's windows of an epoch, counted from 0, from `first` on; collated on demand."""
        groups = epoch_groups(len(self.samples), self.micro_batch_size, number, self.seed)
        for window in windows(groups[first * self.accumulation_steps :], self.accumulation_steps):
            batches = self.share([self.samples[index] for group in window for index in group])
            yield [batch.pinned() if self.pin else batch for batch in batches]

    def share(self, samples: Samples) -> list[Batch]:
        """This process's micro-batches of a window.

        Samples are dealt to the processes in turn. All processes compute together, so they need equally many
        micro-batches: empty ones fill up the shorter shares.
        """
        n = self.ranks.world_size
        shares = [self.groups(samples[rank::n]) for rank in range(n)]
        batches = [self.lay_out(group) for group in shares[self.ranks.rank]]
        none = no_samples(self.padding, self.packing is not None)
        return batches + [none] * (max(map(len, shares)) - len(batches))

    def groups(self, samples: Samples) -> Sequence[Samples]:
        """The samples of each micro-batch of a process's share of a window."""
        if self.packing is not None:
            return rows_of(samples, self.packing)
        size = self.micro_batch_size
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def lay_out(self, group: Samples) -> Batch:
        """A micro-batch of these samples, padded or packed."""
        return collate(group, self.padding) if self.packing is None else end_to_end(group, self.padding)

    def held_out_batches(self) -> Iterator[Batch]:
        """The held-out samples, longest first, in micro-batches no larger than in training unless one sample is."""
        ordered = sorted(self.held_out, key=len, reverse=True)
        room = self.micro_batch_size * max(map(len, self.samples), default=0)  # positions of the widest micro-batch
        while ordered:
            fitting = max(1, min(self.micro_batch_size, room // len(ordered[0])))
            n = fitting if self.packing is None else self.window_size  # to pack into rows
            yield from map(self.lay_out, [ordered[:n]] if self.packing is None else self.groups(ordered[:n]))
            del ordered[:n]

    def held_out_share(self) -> Iterator[Batch]:
        """This process's part of the held-out batches; all processes have equally many."""
        n = self.ranks.world_size
        batches = self.held_out_batches()
        while together := list(islice(batches, n)):
            together += [no_samples(self.padding, self.packing is not None)] * (n - len(together))
            yield together[self.ranks.rank]

    @property
    def window_size(self) -> int:
        """The number of samples in a window; an epoch's last one may have fewer."""
        return self.micro_batch_size * self.accumulation_steps

    @property
    def most_samples(self) -> int:
        """The largest number of a window's samples in one process."""
        return -(-min(self.window_size, len(self.samples)) // self.ranks.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps in an epoch."""
        return -(-len(self.samples) // self.window_size)


@dataclass(frozen=True)
class StepOutput:
    """An optimizer step's results, on the device: reading the tensors waits for it."""

    loss: Tensor  # scalar: mean over the window's target tokens
    grad_norm: Tensor  # scalar: before clipping
    lr: float  # used by the step
    n_tokens: int  # of the window, without padding


def train(
    step: TrainStep, schedule: LRScheduler, data: Windows, epochs: int, position: Position
) -> Iterator[StepOutput]:
    """Train from a position to the end of the last epoch, updating the position; the caller may save between steps."""
    step.model.train()
    while position.epoch < epochs:
        for window in data.epoch(position.epoch, position.window):
            lr = float(schedule.get_last_lr()[0])
            loss, grad_norm = step(window)
            schedule.step()
            position.window, position.step = position.window + 1, position.step + 1
            yield StepOutput(loss, grad_norm, lr, step.ranks.total(sum(batch.n_tokens for batch in window)))
        position.epoch, position.window = position.epoch + 1, 0
