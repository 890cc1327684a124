"""Micro-batches: samples side by side, or end to end, with the positions whose loss counts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llama_ft.data.records import Sample
from llama_ft.model.attention import Segments

PAD_ID = 0  # any piece would do: no real token looks at padding, and padding has no target


@dataclass(frozen=True)
class Padding:
    """How far a batch is padded beyond its longest sample."""

    multiple: int = 1  # up to a multiple of this
    max_width: int | None = None  # but no further than the model's context

    def width(self, longest: int) -> int:
        """The width of a batch whose longest sample is so many tokens wide."""
        return longest + self.added(longest, longest)

    def added(self, width: int, longest: int) -> int:
        """How much a row so wide gets longer, if that makes a sample of it so much longer."""
        added = -width % self.multiple
        return added if self.max_width is None else max(0, min(added, self.max_width - longest))


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
    segments: Segments | None = None  # the samples that lie end to end, where B is 1; None has one in each row

    @property
    def n_targets(self) -> int:
        """N, known without asking the device."""
        return len(self.targets)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the batch keeps in memory."""
        offsets = () if self.segments is None else (self.segments.offsets,)
        return self.tokens, self.target_positions, self.targets, *offsets

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with each of its tensors changed."""
        tokens, positions, targets = map(change, (self.tokens, self.target_positions, self.targets))
        return Batch(tokens, positions, targets, self.n_tokens, self.segments and self.segments.map(change))

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which a copy to a GPU does not make the host wait."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, without waiting for the device if it is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def collate(samples: Sequence[Sample], padding: Padding = NO_PADDING) -> Batch:
    """Pad to the batch's own longest sample, and beyond it as `padding` says."""
    width = padding.width(max(len(sample) for sample in samples) - 1)
    return _batch(samples, range(0, len(samples) * width, width), (len(samples), width))


def rows_of(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """The samples to be laid end to end: as many as have `max_tokens` positions together; a longer one is alone."""
    rows: list[list[Sample]] = []
    room = -1
    for sample in samples:
        if len(sample) - 1 > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(sample)
        room -= len(sample) - 1
    return rows


def end_to_end(samples: Sequence[Sample], padding: Padding = NO_PADDING) -> Batch:
    """A batch of one row with all samples in it; padding makes the last one longer, at which nobody looks."""
    lengths = [len(sample) - 1 for sample in samples]
    starts = [0, *accumulate(lengths)]
    lengths[-1] += padding.added(starts[-1], lengths[-1])
    return _batch(samples, starts[:-1], (1, sum(lengths)), Segments.of(lengths))


def _batch(
    samples: Sequence[Sample], starts: Iterable[int], shape: tuple[int, int], segments: Segments | None = None
) -> Batch:
    """A batch of this shape in which samples start at these of the flattened positions; the rest is padding."""
    tokens = torch.full(shape, PAD_ID)
    positions: list[int] = []
    targets: list[int] = []
    for start, sample in zip(starts, samples, strict=True):
        tokens.view(-1)[start : start + len(sample) - 1] = torch.tensor(sample.tokens[:-1])
        for first, end in sample.spans:
            # The token at position i predicts token i + 1, so targets begin one position before what is trained on.
            positions += range(start + first - 1, start + end - 1)
            targets += sample.tokens[first:end]
    n_tokens = sum(len(sample) for sample in samples)
    return Batch(tokens, torch.tensor(positions), torch.tensor(targets), n_tokens, segments)


def no_samples(padding: Padding, is_packed: bool) -> Batch:
    """A batch of one token and no target: all that is computed of it is 0."""
    width, none = padding.width(1), torch.empty(0, dtype=torch.int64)
    return Batch(torch.full((1, width), PAD_ID), none, none, 0, Segments.of([width]) if is_packed else None)


def blank_row(lengths: Sequence[int], n_targets: int) -> Batch:
    """A batch of sequences end to end of these lengths, of any tokens, with so many targets in all."""
    tokens, positions = torch.full((1, sum(lengths)), PAD_ID), torch.arange(n_targets)
    return Batch(tokens, positions, torch.full_like(positions, PAD_ID), sum(lengths), Segments.of(lengths))


def epoch_groups(n_samples: int, micro_batch_size: int, epoch: int, seed: int) -> list[list[int]]:
    """The indices of each micro-batch's samples, in an order that depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(n_samples, generator=generator).tolist()
    return [order[start : start + micro_batch_size] for start in range(0, n_samples, micro_batch_size)]
