"""The study of decoding: its claims fail where the mechanism that they name is broken."""

from typing import Any

import pytest
from helpers.studies import failed

from experiments import decoding as study
from llama_ft.evaluation import perplexity


def test_a_greedy_choice_of_the_second_best_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "choose", lambda logits, config: logits.topk(2).indices[:, 1])
    assert failed(study, quick, tree=study.tree()) == [0]


def test_a_single_beam_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    search = study.beam_search
    monkeypatch.setattr(study, "beam_search", lambda *_, **options: search(study.tree_state(1), 1, 2, [0], **options))
    assert failed(study, quick, tree=study.tree()) == [1]


def test_sets_of_another_size_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    keep_top_p = study.keep_top_p
    monkeypatch.setattr(study, "keep_top_k", lambda logits, k: logits)
    monkeypatch.setattr(study, "keep_top_p", lambda logits, p: keep_top_p(logits, (1 + p) / 2))
    assert failed(study, quick, sets=study.sets(8)) == [2, 3]


def test_a_loss_of_other_positions_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    summed = perplexity.summed_loss
    monkeypatch.setattr(perplexity, "summed_loss", lambda model, batch: summed(model, batch) * 1.001)
    assert failed(study, quick, perplexity=study.perplexities(4)) == [5, 6]
