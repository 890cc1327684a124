"""The study of decoding: its claims hold, and fail where the mechanism that they name is broken."""

from typing import Any

import pytest
import torch
from conftest import failed
from torch import Tensor

from experiments import decoding as study
from llama_ft.decoding import beam, sampling
from llama_ft.evaluation import perplexity


def test_all_claims_hold(quick: dict[str, Any]) -> None:
    assert len(quick["claims"]) == 7
    assert failed(study, quick) == []


def test_a_greedy_choice_of_the_second_best_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.Greedy, "choose", lambda self, logits, seen: logits.topk(2).indices[:, 1])
    assert failed(study, quick, tree=study.tree()) == [0]


def test_beams_that_forget_what_came_before_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    best = beam._best_candidates

    def forgetful(logits: Tensor, running: list[Any]) -> list[Any]:
        return best(logits, [beam._Beam(each.row, each.tokens, min(each.total, 0.0) * 10) for each in running])

    monkeypatch.setattr(beam, "_best_candidates", forgetful)
    assert failed(study, quick, tree=study.tree()) == [1]


def test_sets_of_another_size_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    keep_top_p = sampling.keep_top_p
    monkeypatch.setattr(sampling, "keep_top_k", lambda logits, k: logits)
    monkeypatch.setattr(sampling, "keep_top_p", lambda logits, p: keep_top_p(logits, (1 + p) / 2))
    assert failed(study, quick, sets=study.sets(8)) == [2, 3]


def test_a_loss_of_other_positions_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    summed = perplexity.summed_loss

    def shifted(model: torch.nn.Module, batch: Any) -> Tensor:
        return summed(model, batch) * 1.001

    monkeypatch.setattr(perplexity, "summed_loss", shifted)
    assert failed(study, quick, perplexity=study.perplexities(4)) == [5, 6]
