"""Chooses the next token from logits, fp32 [B, V]: the most probable one, or one drawn at random.

The functions transform the distribution and are pure; -inf is a probability of 0. Each has a neutral value.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llama_ft.config import DecodingConfig, UserError


def repetition_penalty(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Make tokens that have occurred less probable: divide positive logits by the penalty, multiply negative ones.

    This is CTRL's penalty (Keskar et al. 2019, arXiv 1909.05858). 1 changes nothing; below 1 encourages repetition.
    `seen`, bool [B, V], marks tokens that have occurred, including the prompt's; None marks none.
    """
    if seen is None:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row of fp32 [B, V], and ties, with -inf elsewhere; 0 and k >= V keep all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = logits.topk(k).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus of each row of fp32 [B, V], with -inf elsewhere; 1 keeps all.

    The nucleus is the smallest set of tokens whose probability reaches p, and never empty (Holtzman et al. 2019, arXiv
    1904.09751). Of equally probable tokens at its edge, those with the lowest ids belong to it.
    """
    if p >= 1:
        return logits
    ordered, ids = logits.sort(descending=True, stable=True)
    # A token is outside if those before it reach p, that is, if it and those after it have at most 1 - p. The sum runs
    # from the small end, which loses less to rounding.
    tail = ordered.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    is_outside = tail <= 1 - p
    is_outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(is_outside).scatter(1, ids, is_outside), -math.inf)


def require_distribution(logits: Tensor) -> None:
    """Raise a UserError if a row of fp32 [B, V] is not a distribution: it has NaN or +inf, or only -inf."""
    if not logits.amax(-1).isfinite().all():  # NaN and +inf propagate through amax
        cause = "its weights are damaged, or 16 bit overflow (bf16 and fp32 have more range than fp16)"
        raise UserError(f"the model's logits are not finite, so no token can be chosen: {cause}")


def process(logits: Tensor, config: DecodingConfig, seen: Tensor | None = None) -> Tensor:
    """The logits, fp32 [B, V], after penalty, temperature, top-k and top-p, in that order; `seen` is bool [B, V]."""
    logits = repetition_penalty(logits, seen, config.repetition_penalty)
    return keep_top_p(keep_top_k(logits / config.temperature, config.top_k), config.top_p)


def choose(
    logits: Tensor, config: DecodingConfig, seen: Tensor | None = None, generators: Sequence[torch.Generator] = ()
) -> Tensor:
    """The next token of each row, int64 [B]: the most probable one, among ties that with the lowest id, or a drawn one.

    Each generator draws V random numbers for each of its rows, whatever the logits: a prompt with its own generator
    gets the same answer in a batch as alone. On CUDA, sums of many numbers may round differently from run to run,
    which can move a token across the edge of top-p.

    Args:
        logits: fp32 [B, V]; a UserError unless they are finite.
        seen: bool [B, V], the tokens that have occurred; None if no penalty needs it.
        generators: to sample, on the logits' device; the rows are divided evenly among them, in order.
    """
    logits = process(logits, config, seen)
    require_distribution(logits)
    if not config.sample:
        return logits.argmax(-1)
    # A race of exponential clocks: clock i rings first with probability p[i]. torch.multinomial does the same for
    # one sample, with more checks.
    noise = torch.empty_like(logits)
    for rows, generator in zip(noise.chunk(len(generators)), generators, strict=True):
        rows.exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)
