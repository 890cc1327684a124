"""The study of mixed precision: its claims fail where the mechanism that they name is broken."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.studies import failed

from experiments import mixed_precision as study
from experiments import mixed_precision_runs as runs
from llama_ft.techniques.mixed_precision import Precision


def test_an_autocast_that_does_nothing_loses_nothing(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Precision, "autocast", lambda self: nullcontext())
    assert failed(study, quick, underflow=runs.underflow(study.QUICK_SCALES, lambda line: None)) == [0, 2, 3]


def test_weights_that_are_not_rounded_lose_no_update(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FORMATS", dict.fromkeys(runs.FORMATS, torch.float32))
    assert failed(study, quick, updates=runs.updates()) == [4]


@pytest.mark.parametrize(("options", "claims"), [({"enabled": False}, [5, 6]), ({"growth_factor": 1 + 1e-9}, [6])])
def test_a_scaler_that_is_off_or_never_grows_fails(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], claims: list[int]
) -> None:
    monkeypatch.setattr(Precision, "scaler", lambda self: torch.amp.GradScaler("cpu", **options))
    assert failed(study, quick, scaling=runs.scaling()) == claims


def test_plain_amp_without_copies_of_frozen_weights_fails(quick: dict[str, Any]) -> None:
    """Were frozen weights of fp32 stored in 16 bit, nothing would rise."""
    peak = quick["memory"]["peak"]
    memory = quick["memory"] | {"peak": peak | {"lora_plain": peak["lora_16bit"]}}
    assert failed(study, quick, memory=memory) == [9]


def test_a_plan_without_autocast_saves_nothing(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where the plan's autocast can be broken."""

    def ratio() -> float:
        combinations = (("mp_lora", "fp32"), ("lora", "compute"))
        with_mp, without = (runs.planned_memory("tiny", int(study.FEW), *each)["peak"] for each in combinations)
        return with_mp / without

    assert ratio() == quick["memory"]["peak"]["lora_plain"]["tiny"][study.FEW]
    monkeypatch.setattr(Precision, "autocast", lambda self: nullcontext())
    assert ratio() == pytest.approx(1, abs=0.005)


def test_activations_that_were_halved_would_fail(quick: dict[str, Any]) -> None:
    halved = {model: dict.fromkeys(ratios, 0.5) for model, ratios in quick["memory"]["activation"]["full"].items()}
    memory = quick["memory"] | {"activation": quick["memory"]["activation"] | {"full": halved}}
    assert failed(study, quick, memory=memory) == [7]
    assert failed(study, quick, accumulated=quick["memory"] | {"peak": {"full_ga": {"llama2_7b": {"128": 1.0}}}}) == [8]
