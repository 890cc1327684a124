"""The study of gradient checkpointing: its claims fail where the mechanism that they name is broken."""

from typing import Any

import pytest
from helpers.studies import failed
from torch import Tensor

from experiments import gradient_checkpointing as study
from experiments import gradient_checkpointing_runs as runs
from llama_ft.techniques import gradient_checkpointing as technique


def measured() -> dict[str, Any]:
    return study.measure(study.Options(quick=True), lambda line: None)


@pytest.fixture
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that show the same: a claim's exponents are those of any numbers of layers."""
    for module in (study, runs):
        monkeypatch.setattr(module, "SQUARES", (16, 64, 144))


def test_counts_are_those_of_the_closed_forms(quick: dict[str, Any]) -> None:
    tensor = runs.WIDTH * runs.TOKENS * 4
    for index, n in enumerate(study.SQUARES):
        forwards = {way: counts["forwards"][index] for way, counts in quick["textbook"].items()}
        once_more = {"one checkpoint": 2 * n, "every sqrt(n)-th": 2 * n, "every layer": 2 * n}
        assert forwards == {"keep all": n, "keep none": n + n * (n + 1) // 2, "inference": n} | once_more
        kept = {way: counts["bytes"][index] / tensor for way, counts in quick["textbook"].items()}
        assert n <= kept["keep all"] <= n + 4
        assert 2 * n**0.5 <= kept["every sqrt(n)-th"] <= 2 * n**0.5 + 4


def test_checkpointing_that_keeps_everything_fails(few_layers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(run: Any, x: Tensor, use_reentrant: bool, context_fn: Any, **shared: Any) -> Tensor:
        return run(x, **shared)

    monkeypatch.setattr(technique, "checkpoint", kept)
    assert failed(study, measured()) == [2, 3, 6]


def test_checkpointing_of_every_layer_alone_fails(few_layers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_layers = technique.checkpoint_layers
    monkeypatch.setattr(runs, "checkpoint_layers", lambda model, every: checkpoint_layers(model, 1))
    assert failed(study, measured()) == [3, 6]


def test_a_recomputation_that_differs_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, calls = technique.checkpoint, 0

    def differing(run: Any, *args: Any, **named: Any) -> Tensor:
        def each_time_more(*given: Any, **shared: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return run(*given, **shared) * (1 + calls * 1e-3)

        return checkpoint(each_time_more, *args, **named)

    monkeypatch.setattr(technique, "checkpoint", differing)
    assert failed(study, quick, gradients_apart=runs.gradients_apart()) == [5]


def test_recomputing_from_a_kept_middle_fails(few_layers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps every layer's input is not what keeps nothing."""
    monkeypatch.setattr(runs, "keep_nothing", lambda model: technique.checkpoint_layers(model, 1))
    assert failed(study, measured()) == [1]


def test_inference_that_keeps_its_activations_fails(few_layers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = runs.passes
    monkeypatch.setattr(runs, "passes", lambda model, n_tokens, trains=True: passes(model, n_tokens))
    assert failed(study, measured()) == [4]


def test_a_block_that_keeps_its_input_alone_fails(quick: dict[str, Any]) -> None:
    blocks = quick["blocks"]
    textbooks = {way: {key: counts[key][0] for key in counts} for way, counts in quick["textbook"].items()}
    assert failed(study, quick, blocks=blocks | {"ways": textbooks, "times_its_input": 1.0}) == [6]
