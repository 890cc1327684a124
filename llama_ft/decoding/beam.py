"""Beam search: the most probable continuations found by a search of limited width.

Finished hypotheses, normalized scores and the end of the search are defined as in transformers 5's `generate`, so that
both find the same continuations.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ft.decoding.sampling import require_distribution
from llama_ft.decoding.state import GenerationState


@dataclass(frozen=True)
class Hypothesis:
    """A continuation of the prompt that the search has finished."""

    tokens: list[int]  # those after the prompt; the last is an end token, unless `max_new_tokens` was reached
    score: float  # the sum of their natural log-probabilities, over len(tokens) ** length_penalty


@dataclass(frozen=True)
class _Beam:
    row: int  # of the state, which holds these tokens without the last
    tokens: list[int]
    total: float  # sum of their log-probabilities


def beam_search(
    state: GenerationState,
    n_beams: int,
    max_new_tokens: int,
    ends: Collection[int],
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    n_return: int = 1,
) -> list[Hypothesis]:
    """Continue one prompt along its `n_beams` best beams, and return the best hypotheses, best first.

    Each step considers the n_beams * max(2, 1 + len(ends)) best candidates. Of the first n_beams, those that end, or
    all at max_new_tokens, become hypotheses, of which the best are kept. The best n_beams candidates that do not end
    continue. Logits that are not a distribution (NaN, infinite) are a UserError.

    Args:
        state: the prompt in n_beams equal rows, of which only the first starts, with room for max_new_tokens.
        length_penalty: exponent of the length that totals are divided by; above 0 favors longer continuations.
        early_stopping: end once n_beams hypotheses are finished; else when no running beam's current score beats them.
        n_return: the number of hypotheses to return; fewer are returned only if no more exist.
    """
    running = [_Beam(row, [], -math.inf if row else 0.0) for row in range(n_beams)]
    finished: list[Hypothesis] = []
    for length in range(1, max_new_tokens + 1):
        is_last, divisor = length == max_new_tokens, length**length_penalty
        candidates = _best_candidates(state.next_logits(), running, max(2, 1 + len(ends)))
        ended = [beam for beam in candidates[:n_beams] if is_last or beam.tokens[-1] in ends]
        # -inf marks an impossible continuation, or a copy of the first row.
        finished += [Hypothesis(beam.tokens, beam.total / divisor) for beam in ended if beam.total > -math.inf]
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:n_beams]
        # Each end token follows a beam at most once, so at least n_beams of the candidates continue.
        running = [beam for beam in candidates if beam.tokens[-1] not in ends][:n_beams]
        is_settled = len(finished) == n_beams and (early_stopping or running[0].total / divisor <= finished[-1].score)
        if is_last or is_settled:
            break
        device = state.tokens.device
        state.reorder(torch.tensor([beam.row for beam in running], device=device))
        state.append(torch.tensor([beam.tokens[-1] for beam in running], device=device))
    return finished[:n_return]


def _best_candidates(logits: Tensor, running: list[_Beam], n_each: int) -> list[_Beam]:
    """The `n_each` * B best continuations, best first, from the logits of the B running beams, fp32 [B, V]."""
    require_distribution(logits)
    n_beams, vocab_size = logits.shape
    totals = torch.tensor([beam.total for beam in running], dtype=torch.float32, device=logits.device)
    best = (logits.log_softmax(-1) + totals[:, None]).flatten().topk(min(n_each, vocab_size) * n_beams)
    candidates = []
    for total, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        row, token = divmod(index, vocab_size)
        candidates.append(_Beam(row, [*running[row].tokens, token], total))
    return candidates
