"""The study of low rank: its claims hold, and fail where the mechanism that they name is broken."""

import io
import json
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import low_rank as study
from experiments.study import run
from llama_ft.techniques.lora import LoRALinear


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("quick")
    with redirect_stdout(io.StringIO()):
        assert run(study.STUDY, ["quick=true", f"output={folder}"]) == 0
    assert (folder / "low_rank.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "low_rank.json").read_text())


def failed(numbers: dict[str, Any], **changed: Any) -> list[int]:
    """The claims that do not hold, by their place."""
    return [place for place, claim in enumerate(study.claims_of(numbers | changed)) if not claim.holds]


def test_all_claims_hold(quick: dict[str, Any]) -> None:
    assert len(quick["claims"]) == 9
    assert failed(quick) == []


def test_the_smallest_singular_values_first_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    svd = torch.linalg.svd

    def reversed_order(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, values, v = svd(matrix)
        return u.flip(1), values.flip(0), v.flip(0)

    monkeypatch.setattr(torch.linalg, "svd", reversed_order)
    assert failed(quick, picture=study.decomposition(study.picture())) == [2]


def test_factors_that_are_not_orthogonal_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    svd = torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda matrix: (svd(matrix).U * 1.01, svd(matrix).S / 1.01, svd(matrix).Vh)
    )
    assert failed(quick, picture=study.decomposition(study.picture())) == [0, 1]


def test_a_layer_with_another_scale_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LoRALinear.forward
    monkeypatch.setattr(LoRALinear, "forward", lambda self, x: 2 * forward(self, x))
    assert failed(quick, balanced=study.split(balanced=True)) == [5, 8]


def test_the_same_split_twice_fails(quick: dict[str, Any]) -> None:
    assert failed(quick, one_sided=quick["balanced"]) == [6, 7, 8]


def test_noise_has_no_low_rank(quick: dict[str, Any]) -> None:
    noise = torch.randn(study.SIDE, study.SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert failed(quick, picture=study.decomposition(noise)) == [2]
