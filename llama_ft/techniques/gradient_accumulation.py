"""Gradient accumulation: several small micro-batches stand for one large batch.

Exact, that is equal to the large batch up to rounding, also where micro-batches differ in their number of target
tokens: each micro-batch's *summed* loss is divided by the number of target tokens in the whole window. (A mean of the
micro-batches' means weights their tokens unequally; transformers did that until 4.46.)
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar


class HasTargets(Protocol):
    """A micro-batch that knows how many tokens it is trained on."""

    @property
    def n_targets(self) -> int:
        """Number of target tokens."""
        ...


M = TypeVar("M")


def windows(micro_batches: Iterable[M], steps: int) -> Iterator[tuple[M, ...]]:
    """Cut an epoch's micro-batches into windows of `steps`, one optimizer step each; the last may be shorter."""
    remaining = iter(micro_batches)
    while window := tuple(islice(remaining, steps)):
        yield window


def target_tokens(window: Sequence[HasTargets]) -> int:
    """What the summed loss of each micro-batch of the window is divided by."""
    return sum(micro_batch.n_targets for micro_batch in window)
