"""Beam search: the most probable continuations that a search of limited width finds.

What counts as finished, how scores are normalised and when the search ends are as in `generate` of transformers 5, so
that both find the same continuations.
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

    tokens: list[int]  # what follows the prompt; the last is an end, unless `max_new_tokens` ended it
    score: float  # the sum of their log-probabilities (natural), over (how many there are) ** length_penalty


@dataclass(frozen=True)
class _Beam:
    row: int  # of the state, whose tokens are these without the last
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

    Each step looks at the 2 * n_beams best candidates, or with several ends at one more for each. Those of the first
    n_beams that end, or all at max_new_tokens, become hypotheses, of which the best are kept; the best n_beams that do
    not end run on. Logits that are no distribution (NaN, infinite) are a UserError.

    Args:
        state: the prompt in n_beams equal rows, of which the first alone begins, with room for max_new_tokens.
        length_penalty: exponent of the length that totals are divided by; above 0 favours longer continuations.
        early_stopping: end once n_beams hypotheses are finished; else when no running beam's present score beats them.
        n_return: how many hypotheses to return. Fewer come back only where no more than that are possible at all.
    """
    running = [_Beam(row, [], -math.inf if row else 0.0) for row in range(n_beams)]
    finished: list[Hypothesis] = []
    for length in range(1, max_new_tokens + 1):
        is_last, divisor = length == max_new_tokens, length**length_penalty
        candidates = _best_candidates(state.next_logits(), running, max(2, 1 + len(ends)))
        ended = [beam for beam in candidates[:n_beams] if is_last or beam.tokens[-1] in ends]
        # -inf is a continuation that cannot be, or a copy of the row that began.
        finished += [Hypothesis(beam.tokens, beam.total / divisor) for beam in ended if beam.total > -math.inf]
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:n_beams]
        # Each end follows a beam at most once, so that n_beams of the candidates run on.
        running = [beam for beam in candidates if beam.tokens[-1] not in ends][:n_beams]
        is_settled = len(finished) == n_beams and (early_stopping or running[0].total / divisor <= finished[-1].score)
        if is_last or is_settled:
            break
        device = state.tokens.device
        state.reorder(torch.tensor([beam.row for beam in running], device=device))
        state.append(torch.tensor([beam.tokens[-1] for beam in running], device=device))
    return finished[:n_return]


def _best_candidates(logits: Tensor, running: list[_Beam], n_each: int) -> list[_Beam]:
    """The `n_each` * B best ways to go on, best first, by the logits of the B running beams, fp32 [B, V]."""
    require_distribution(logits)
    n_beams, vocab_size = logits.shape
    totals = torch.tensor([beam.total for beam in running], dtype=torch.float32, device=logits.device)
    best = (logits.log_softmax(-1) + totals[:, None]).flatten().topk(min(n_each, vocab_size) * n_beams)
    candidates = []
    for total, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        row, token = divmod(index, vocab_size)
        candidates.append(_Beam(row, [*running[row].tokens, token], total))
    return candidates
