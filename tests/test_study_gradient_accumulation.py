"""The study of gradient accumulation: its claims fail where the mechanism that they name is broken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.studies import failed

from experiments import gradient_accumulation as study
from experiments import gradient_accumulation_runs as runs
from experiments.shared import ALPACA_LENGTHS
from llama_ft.config import OnBadRecord
from llama_ft.data.dataset import read_records
from llama_ft.data.template import ALPACA_TEMPLATE
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.model.transformer import RMSNorm
from llama_ft.training import step


def test_the_lengths_are_alpacas(test_data: Path) -> None:
    tokenizer = Tokenizer(test_data / "llama2_tokenizer.model")
    records, _ = read_records(test_data / "alpaca_data_200.json", OnBadRecord.error)
    samples = [ALPACA_TEMPLATE.sample(record, tokenizer) for record in records]
    assert json.loads(ALPACA_LENGTHS.read_text())["lengths"] == [[s.n_prompt, len(s)] for s in samples]


def test_a_division_by_something_else_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "target_tokens", lambda window: window[0].n_targets)
    assert failed(study, quick, linear=runs.linear_model()) == [0]


def test_a_mean_of_means_in_the_step_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the bug of transformers before 4.46 was: the loss of each micro-batch divided by its own tokens."""
    summed = step.summed_loss
    monkeypatch.setattr(step, "summed_loss", lambda model, batch: summed(model, batch) / batch.n_targets)
    monkeypatch.setattr(step, "target_tokens", len)
    broken = runs.language_model(1, lambda line: None)
    assert failed(study, quick, language_model=broken) == [2]


def test_a_norm_over_the_batch_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(0, keepdim=True) + self.eps) * self.weight

    monkeypatch.setattr(RMSNorm, "forward", forward)
    assert failed(study, quick, norms=runs.norms(quick["micro_batch_sizes"])) == [6]


def test_statistics_that_are_not_the_micro_batchs_fail(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.BatchNorm1d, "forward", lambda self, x: x)  # the mean stays 0
    assert failed(study, quick, statistics=runs.statistics(quick["micro_batch_sizes"])) == [5]


def test_a_mean_that_moves_away_with_the_size_fails(quick: dict[str, Any]) -> None:
    statistics = quick["statistics"] | {"mean": quick["statistics"]["mean"][::-1]}
    assert failed(study, quick, statistics=statistics) == [5]
