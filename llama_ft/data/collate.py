"""Micro-batches: samples side by side, with the positions whose loss counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ft.data.dataset import Sample

PAD_ID = 0  # any piece would do: no real token looks at padding, and padding has no target


@dataclass(frozen=True)
class Padding:
    """How far a batch is padded beyond its longest sample."""

    multiple: int = 1  # up to a multiple of this
    max_width: int | None = None  # but no further than the model's context

    def width(self, longest: int) -> int:
        """The width of a batch whose longest sample is so many tokens wide."""
        rounded = -(-longest // self.multiple) * self.multiple
        return rounded if self.max_width is None else max(longest, min(rounded, self.max_width))


NO_PADDING = Padding()


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B samples of up to S + 1 tokens; its N target tokens stand apart.

    The head and the loss run at the N positions alone, which is exact and leaves out the prompt's half of the logits.
    """

    tokens: Tensor  # int64 [B, S], padded on the right
    target_positions: Tensor  # int64 [N], indices into the B * S flattened positions
    targets: Tensor  # int64 [N], the token that follows each of them
    n_tokens: int  # real tokens, BOS and EOS included, padding not

    @property
    def n_targets(self) -> int:
        """N, known without asking the device."""
        return len(self.targets)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the batch keeps in memory."""
        return self.tokens, self.target_positions, self.targets

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which a copy to a GPU does not make the host wait."""
        tokens, positions, targets = (tensor.pin_memory() for tensor in self.tensors)
        return Batch(tokens, positions, targets, self.n_tokens)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, without waiting for the device if it is pinned."""
        tokens, positions, targets = (tensor.to(device, non_blocking=True) for tensor in self.tensors)
        return Batch(tokens, positions, targets, self.n_tokens)


def collate(samples: Sequence[Sample], padding: Padding = NO_PADDING) -> Batch:
    """Pad to the batch's own longest sample, and beyond it as `padding` says."""
    width = padding.width(max(len(sample) for sample in samples) - 1)
    tokens = torch.full((len(samples), width), PAD_ID)
    positions: list[int] = []
    targets: list[int] = []
    for row, sample in enumerate(samples):
        tokens[row, : len(sample) - 1] = torch.tensor(sample.tokens[:-1])
        # The token at position i predicts token i + 1, so targets begin one position before the answer does.
        positions += range(row * width + sample.n_prompt - 1, row * width + len(sample) - 1)
        targets += sample.tokens[sample.n_prompt :]
    return Batch(tokens, torch.tensor(positions), torch.tensor(targets), sum(len(sample) for sample in samples))


def epoch_groups(n_samples: int, micro_batch_size: int, epoch: int, seed: int) -> list[list[int]]:
    """The indices of each micro-batch's samples, in an order that depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(n_samples, generator=generator).tolist()
    return [order[start : start + micro_batch_size] for start in range(0, n_samples, micro_batch_size)]


def epoch_batches(
    samples: Sequence[Sample],
    micro_batch_size: int,
    epoch: int,
    seed: int,
    padding: Padding = NO_PADDING,
    first_batch: int = 0,
) -> Iterator[Batch]:
    """The micro-batches of an epoch from `first_batch` on, each collated when it is asked for."""
    for group in epoch_groups(len(samples), micro_batch_size, epoch, seed)[first_batch:]:
        yield collate([samples[index] for index in group], padding)
