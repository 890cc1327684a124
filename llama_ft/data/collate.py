"""Micro-batches: samples padded in rows or packed end to end, with the positions whose loss counts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llama_ft.data.records import Sample, Samples
from llama_ft.model.attention import Segments

PAD_ID = 0  # any token would do: no real token attends to padding, and padding has no target


@dataclass(frozen=True)
class Padding:
    """Padding of a batch beyond its longest sample."""

    multiple: int = 1  # up to a multiple of this
    max_width: int | None = None  # but no further than the model's context

    def width(self, longest: int) -> int:
        """The width of a batch whose longest sample has this width."""
        return longest + self.added(longest, longest)

    def added(self, width: int, longest: int) -> int:
        """The padding of a row of this width, where the padding lengthens a sample of width `longest`."""
        added = -width % self.multiple
        return added if self.max_width is None else max(0, min(added, self.max_width - longest))


NO_PADDING = Padding()


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B samples of up to S + 1 tokens, with its N target tokens stored separately.

    The head and the loss run only at the N target positions, which is exact and saves the logits of the prompts.
    """

    tokens: Tensor  # int64 [B, S], padded on the right
    target_positions: Tensor  # int64 [N], indices into the B * S flattened positions
    targets: Tensor  # int64 [N], the token that follows each of them
    n_tokens: int  # real tokens, including BOS and EOS, without padding
    segments: Segments | None = None  # the samples packed end to end (B is 1); None: one sample per row

    @property
    def n_targets(self) -> int:
        """N, read without synchronizing with the device."""
        return len(self.targets)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the batch keeps in memory."""
        offsets = () if self.segments is None else (self.segments.offsets,)
        return self.tokens, self.target_positions, self.targets, *offsets

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with each of its tensors changed."""
        tokens, positions, targets = map(change, (self.tokens, self.target_positions, self.targets))
        return Batch(tokens, positions, targets, self.n_tokens, self.segments and self.segments.map(change))

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, which can be copied to a GPU without making the host wait."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, copied without waiting if it is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def collate(samples: Samples, padding: Padding = NO_PADDING) -> Batch:
    """Pad to the batch's longest sample, and beyond it as `padding` says."""
    width = padding.width(max(len(sample) for sample in samples) - 1)
    return _batch(samples, range(0, len(samples) * width, width), (len(samples), width))


def rows_of(samples: Samples, max_tokens: int) -> list[list[Sample]]:
    """Group samples into packed rows of at most `max_tokens` positions; a longer sample gets its own row."""
    rows: list[list[Sample]] = []
    room = -1
    for sample in samples:
        if len(sample) - 1 > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(sample)
        room -= len(sample) - 1
    return rows


def end_to_end(samples: Samples, padding: Padding = NO_PADDING) -> Batch:
    """Pack all samples into a batch of one row; padding lengthens the last sample."""
    lengths = [len(sample) - 1 for sample in samples]
    starts = [0, *accumulate(lengths)]
    lengths[-1] += padding.added(starts[-1], lengths[-1])
    return _batch(samples, starts[:-1], (1, sum(lengths)), Segments.of(lengths))


def _batch(samples: Samples, starts: Iterable[int], shape: tuple[int, int], segments: Segments | None = None) -> Batch:
    """A batch of this shape whose samples start at these flattened positions; the rest is padding."""
    tokens = torch.full(shape, PAD_ID)
    positions: list[int] = []
    targets: list[int] = []
    for start, sample in zip(starts, samples, strict=True):
        tokens.view(-1)[start : start + len(sample) - 1] = torch.tensor(sample.tokens[:-1])
        for first, end in sample.spans:
            # The token at position i predicts token i + 1, so target positions begin one before the span.
            positions += range(start + first - 1, start + end - 1)
            targets += sample.tokens[first:end]
    n_tokens = sum(len(sample) for sample in samples)
    return Batch(tokens, torch.tensor(positions), torch.tensor(targets), n_tokens, segments)


def no_samples(padding: Padding, is_packed: bool) -> Batch:
    """A batch of one token and no target: its loss and gradients are 0."""
    width, none = padding.width(1), torch.empty(0, dtype=torch.int64)
    return Batch(torch.full((1, width), PAD_ID), none, none, 0, Segments.of([width]) if is_packed else None)


def blank_row(lengths: Sequence[int], n_targets: int) -> Batch:
    """A packed batch of arbitrary tokens, with sequences of these lengths and `n_targets` targets in all."""
    tokens, positions = torch.full((1, sum(lengths)), PAD_ID), torch.arange(n_targets)
    return Batch(tokens, positions, torch.full_like(positions, PAD_ID), sum(lengths), Segments.of(lengths))


def epoch_groups(n_samples: int, micro_batch_size: int, epoch: int, seed: int) -> list[list[int]]:
    """The indices of each micro-batch's samples, in an order that depends only on seed and epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(n_samples, generator=generator).tolist()
    return [order[start : start + micro_batch_size] for start in range(0, n_samples, micro_batch_size)]
