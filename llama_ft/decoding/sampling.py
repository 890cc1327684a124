"""Choosing the next token by its logits, fp32 [B, V]: the most probable one, or one drawn at random.

The functions change the distribution and are pure; -inf is a probability of 0. Each has a value that changes nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ft.config import UserError


def repetition_penalty(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Make tokens that have occurred less probable: positive logits divided by the penalty, negative multiplied.

    That of CTRL (Keskar et al. 2019, arXiv 1909.05858). 1 changes nothing; below 1 repetition is encouraged. `seen` is
    bool [B, V]: which tokens have occurred, those of the prompt included; None is none.
    """
    if seen is None:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row of fp32 [B, V], and their equals, -inf elsewhere; 0, V and more keep all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = logits.topk(k).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The nucleus of each row of fp32 [B, V], -inf elsewhere; 1 keeps all.

    It is the smallest set of tokens whose probability reaches p, and never empty (Holtzman et al. 2019, arXiv
    1904.09751). Of equal tokens at its edge those with the lowest ids belong to it.
    """
    if p >= 1:
        return logits
    ordered, ids = logits.sort(descending=True, stable=True)
    # A token is outside where those before it reach p: where it and those after it have 1 - p at most. Summed from
    # the small end, which loses less to rounding.
    tail = ordered.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    is_outside = tail <= 1 - p
    is_outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(is_outside).scatter(1, ids, is_outside), -math.inf)


def require_distribution(logits: Tensor) -> None:
    """Raise a UserError if a row of fp32 [B, V] is no distribution: it has NaN or +inf, or nothing but -inf."""
    if not logits.amax(-1).isfinite().all():  # which NaN and +inf pass through
        cause = "its weights are damaged, or 16 bit overflow (bf16 and fp32 have more range than fp16)"
        raise UserError(f"the model's logits are not finite, so no token can be chosen: {cause}")


@dataclass(frozen=True)
class Greedy:
    """Always the most probable token; of several the one with the lowest id."""

    repetition_penalty: float = 1.0

    def choose(self, logits: Tensor, seen: Tensor | None, generators: Sequence[torch.Generator] = ()) -> Tensor:
        """The next token of each row, int64 [B]; a UserError if the logits are not finite. Nothing is random."""
        logits = repetition_penalty(logits, seen, self.repetition_penalty)
        require_distribution(logits)
        return logits.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """A token at random, by its probability after penalty, temperature, top-k and top-p, in that order."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def process(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """The logits, fp32 [B, V], of the distribution that is drawn from; `seen` is bool [B, V]."""
        logits = repetition_penalty(logits, seen, self.repetition_penalty)
        return keep_top_p(keep_top_k(logits / self.temperature, self.top_k), self.top_p)

    def choose(self, logits: Tensor, seen: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of each row, int64 [B].

        Each generator draws V random numbers for each of its rows, whatever the logits: a prompt with a generator of
        its own is answered in a batch as it is by itself. On CUDA, sums of many numbers may round differently from run
        to run, which can move a token across the edge of top-p.

        Args:
            logits: fp32 [B, V]; not finite ones are a UserError.
            seen: bool [B, V], which tokens have occurred; None where no penalty asks for it.
            generators: on the device of the logits; the rows are divided evenly among them, in order.
        """
        logits = self.process(logits, seen)
        require_distribution(logits)
        # A race of exponential clocks: the first to ring is i with probability p[i]. What torch.multinomial does for
        # one sample, without its checks.
        noise = torch.empty_like(logits)
        for rows, generator in zip(noise.chunk(len(generators)), generators, strict=True):
            rows.exponential_(generator=generator)
        return (logits.softmax(-1) / noise).argmax(-1)
