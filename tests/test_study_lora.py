"""The study of LoRA: its claims fail where the mechanism that they name is broken."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.studies import failed
from torch import Tensor, nn

from experiments import lora as study
from experiments.lora_costs import backward_flops, flops
from llama_ft.techniques.lora import LoRALinear


def test_an_adapter_that_does_not_begin_at_zero_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.init, "zeros_", nn.init.ones_)  # of B
    assert failed(study, quick, at_the_start=study.at_the_start()) == [0]


def test_factors_of_another_size_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    begin = LoRALinear.__init__
    monkeypatch.setattr(LoRALinear, "__init__", lambda self, base, rank, *a, **k: begin(self, base, 2 * rank, *a, **k))
    percents = {name: study.trainable_percent(targets) for name, targets in study.TARGETS.items()}
    changed = {"factor_parameters": study.factor_parameters(), "trainable_percent": percents}
    assert failed(study, quick, **changed) == [1, 2]


def test_a_merged_layer_that_computes_its_factors_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LoRALinear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale * (
            not self.merged
        )

    monkeypatch.setattr(LoRALinear, "forward", forward)
    assert failed(study, quick, flops=flops()) == [3]


def test_weights_that_are_not_frozen_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "requires_grad_", lambda self, requires_grad=True: self)
    backward = quick["backward"] | {"lora": backward_flops(lora=True)}
    assert failed(study, quick, backward=backward) == [5]


def test_an_update_that_is_not_taken_out_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def unmerge(self: LoRALinear) -> None:
        self.weight -= 0.99 * self._update()
        self.merged = False

    monkeypatch.setattr(LoRALinear, "unmerge", unmerge)
    assert failed(study, quick, switching=quick["switching"] | {"fp32": study.switching(torch.float32)}) == [6]


def test_equal_times_fail(quick: dict[str, Any]) -> None:
    assert failed(study, quick, latency={"beside": 1.0, "merged": 1.0}) == [4]
