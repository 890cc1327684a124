"""The data of a run as optimizer steps: windows of micro-batches, collated as they are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llama_ft.data.collate import NO_PADDING, Padding, epoch_batches
from llama_ft.data.dataset import Sample
from llama_ft.techniques.gradient_accumulation import windows
from llama_ft.training.step import TrainStep, Window


@dataclass(frozen=True)
class Windows:
    """Callable: the windows of an epoch. Their order depends on the seed and the epoch alone."""

    samples: Sequence[Sample]
    micro_batch_size: int = 1
    accumulation_steps: int = 1
    seed: int = 0
    padding: Padding = NO_PADDING
    pin: bool = False  # whether micro-batches are put into page-locked memory, for a GPU

    @classmethod
    def over(
        cls,
        samples: Sequence[Sample],
        step: TrainStep,
        micro_batch_size: int,
        accumulation_steps: int,
        seed: int = 0,
    ) -> "Windows":
        """Those of a training step, padded and pinned as its precision and device want them."""
        padding = Padding(step.precision.pad_multiple, step.model.config.max_seq_len)
        return cls(samples, micro_batch_size, accumulation_steps, seed, padding, step.device.type == "cuda")

    def __call__(self, epoch: int, first: int = 0) -> Iterator[Window]:
        """The windows of an epoch, counted from 0, from the window `first` on."""
        first_batch = first * self.accumulation_steps
        batches = epoch_batches(self.samples, self.micro_batch_size, epoch, self.seed, self.padding, first_batch)
        return windows((batch.pinned() if self.pin else batch for batch in batches), self.accumulation_steps)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        n_micro_batches = -(-len(self.samples) // self.micro_batch_size)
        return -(-n_micro_batches // self.accumulation_steps)
