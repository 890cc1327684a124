"""The study of the optimizer: its claims fail where the mechanism that they name is broken."""

import math
from typing import Any

import pytest
from helpers.studies import failed
from torch.optim import Adam, AdamW

from experiments import optimizer as study
from llama_ft.training import setup


@pytest.mark.parametrize(("form", "claim"), [({"foreach": True}, 1), ({"amsgrad": True, "fused": True}, 0)])
def test_an_optimizer_that_needs_more_memory_fails(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, form: dict[str, bool], claim: int
) -> None:
    """In PyTorch's default form; with a third moment."""
    monkeypatch.setattr(study, "make_optimizer", lambda parameters, config: AdamW(parameters, **form))
    assert failed(study, quick, memory=quick["memory"] | {"fused": study.memory_of("fused")}) == [claim]


def test_decay_as_part_of_the_gradient_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "make_optimizer", lambda p, config: Adam(p, config.lr, weight_decay=config.weight_decay))
    assert failed(study, quick, decays=study.decays()) == [3]


def test_a_schedule_that_ends_half_way_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def half(step: int, total_steps: int, **_: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / (2 * total_steps)))

    monkeypatch.setattr(setup, "lr_factor", half)
    assert failed(study, quick, schedules=study.schedules()) == [5]
