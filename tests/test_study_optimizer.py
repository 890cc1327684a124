"""The study of the optimizer: its claims fail where the mechanism that they name is broken."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers.studies import failed

from experiments import optimizer as study
from llama_ft.training import optimizer


def test_an_optimizer_in_pytorchs_default_form_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "make_optimizer", lambda parameters, config: torch.optim.AdamW(parameters, foreach=True))
    assert failed(study, quick, memory=quick["memory"] | {"fused": study.memory_of("fused")}) == [1]


def test_an_optimizer_with_a_third_moment_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    amsgrad = partial(torch.optim.AdamW, amsgrad=True, fused=True)
    monkeypatch.setattr(study, "make_optimizer", lambda parameters, config: amsgrad(parameters))
    assert failed(study, quick, memory=quick["memory"] | {"fused": study.memory_of("fused")}) == [0]


def test_decay_as_part_of_the_gradient_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def adam(parameters: Any, config: Any) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)

    monkeypatch.setattr(study, "make_optimizer", adam)
    assert failed(study, quick, decays=study.decays()) == [3]


def test_a_schedule_that_ends_half_way_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def half(step: int, *, total_steps: int, warmup_steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / (2 * total_steps)))

    monkeypatch.setattr(optimizer, "lr_factor", half)
    assert failed(study, quick, schedules=study.schedules()) == [5]
