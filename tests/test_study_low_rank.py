"""The study of low rank: its claims fail where the mechanism that they name is broken."""

from typing import Any

import pytest
import torch
from helpers.studies import failed

from experiments import low_rank as study
from llama_ft.techniques.lora import LoRALinear


def test_the_smallest_singular_values_first_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m: (svd(m).U.flip(1), svd(m).S.flip(0), svd(m).Vh.flip(0)))
    assert failed(study, quick, picture=study.decomposition(study.picture())) == [3]


def test_factors_that_are_not_orthogonal_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m: (svd(m).U * 1.01, svd(m).S / 1.01, svd(m).Vh))
    assert failed(study, quick, picture=study.decomposition(study.picture())) == [0, 1, 2]


def test_a_layer_with_another_scale_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LoRALinear.forward
    monkeypatch.setattr(LoRALinear, "forward", lambda self, x: 2 * forward(self, x))
    assert failed(study, quick, balanced=study.split(balanced=True)) == [6, 9]


def test_the_same_split_twice_fails(quick: dict[str, Any]) -> None:
    assert failed(study, quick, one_sided=quick["balanced"]) == [7, 8, 9]


def test_noise_has_no_low_rank(quick: dict[str, Any]) -> None:
    noise = torch.randn(study.SIDE, study.SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert failed(study, quick, picture=study.decomposition(noise)) == [3]
