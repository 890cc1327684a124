"""Gradient accumulation: several small micro-batches replace one large batch.

The result equals the large batch's up to rounding, even if micro-batches have different numbers of target tokens: each
micro-batch's *summed* loss is divided by the number of target tokens in the whole window. (A mean of the micro-batches'
means weights their tokens unequally; transformers did that until 4.46.)
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar


class HasTargets(Protocol):
    """A micro-batch that knows its number of target tokens."""

    @property
    def n_targets(self) -> int:
        """The number of target tokens."""
        ...


M = TypeVar("M")


def windows(micro_batches: Iterable[M], steps: int) -> Iterator[tuple[M, ...]]:
    """Cut an epoch's micro-batches into windows of `steps`, one optimizer step each; the last may be shorter."""
    remaining = iter(micro_batches)
    while window := tuple(islice(remaining, steps)):
        yield window


def target_tokens(window: Sequence[HasTargets]) -> int:
    """The divisor of each micro-batch's summed loss: the window's number of target tokens."""
    return sum(micro_batch.n_targets for micro_batch in window)
