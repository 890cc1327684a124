"""Whether a run fits, asked before its weights are loaded: at the very limit, what it says, what it does not ask."""

import math
import os
import unittest.mock
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.planning import SHORT, WIDE_HEAD, card, small_config

from llama_ft.config import GpuConfig, OptimConfig, TrainConfig, UserError
from llama_ft.config.checks import Policy
from llama_ft.config.groups import MeasureConfig
from llama_ft.launch import child, process
from llama_ft.planning import fit
from llama_ft.planning.fit import Capacity, alternatives, capacity_of, objection, objection_here, reserved_mib
from llama_ft.planning.gpu_traits import traits_of, workspace_bytes
from llama_ft.system import MIB

CARD = card("a", context_mib=10)
TRAITS, WORKSPACE = traits_of(CARD), workspace_bytes(CARD)


def config_of(optim: OptimConfig) -> TrainConfig:
    return replace(small_config(), model=WIDE_HEAD, optim=optim)


def need(optim: OptimConfig) -> float:
    return reserved_mib(config_of(optim), SHORT, TRAITS, WORKSPACE)


def asked(optim: OptimConfig, mib: float, context_mib: float = 0) -> str | None:
    return objection(config_of(optim), SHORT, Capacity(mib, context_mib, f"a has {mib:,.0f}"), TRAITS, WORKSPACE)


@pytest.mark.parametrize("context_mib", [0, 300])
def test_what_is_needed_is_enough_and_one_less_is_not(context_mib: int) -> None:
    enough = need(OptimConfig()) + context_mib
    assert asked(OptimConfig(), enough, context_mib) is None
    text = str(asked(OptimConfig(), enough - 1, context_mib))
    assert text.startswith(f"baseline on wide needs {enough:,.0f} MiB at its peak, but a has {enough - 1:,.0f}: ")
    assert text.endswith("; plan.enforce=false runs it anyway")


def test_what_would_fit_is_named_with_its_need() -> None:
    least = OptimConfig(mp=True, lora=True)
    assert f": optim=mp_lora would need {need(least):,.0f};" in str(asked(OptimConfig(), need(least)))
    accumulating = asked(OptimConfig(ga=True), need(replace(least, ga=True)))
    assert "optim=ga_mp_lora would need" in str(accumulating)


def test_where_nothing_would_fit_a_card_is_to_be_found() -> None:
    text = str(asked(OptimConfig(), 30))
    assert "even optim=mp_lora optim.gc=true mp.frozen_weights=nf4 gc.offload=cpu would need" in text
    assert "python -m llama_ft.plan model=wide goal=cheapest_gpu" in text


@pytest.mark.parametrize(
    ("on", "activations_suffice", "expected"),
    [
        ("", True, ["gc", "mp_lora_gc"]),
        ("", False, ["mp_lora", "mp_lora_gc"]),
        ("ga", False, ["ga_mp_lora", "ga_mp_lora_gc"]),
        ("mp lora", False, ["mp_lora_gc"]),
        ("mp lora", True, ["mp_lora_gc"]),
        ("lora gc", True, ["mp_lora_gc"]),
        ("gc", False, ["mp_lora_gc"]),
        ("mp lora gc", False, []),
    ],
)
def test_alternatives_are_two_at_most_smallest_change_first_then_4_bits(
    on: str, activations_suffice: bool, expected: list[str]
) -> None:
    config = small_config(**dict.fromkeys(on.split(), True))
    found = [(other.optim.combination, settings) for other, settings in alternatives(config, activations_suffice)]
    smallest = replace(config.optim, mp=True, lora=True, gc=True).combination
    assert found[: len(expected)] == [(each, {}) for each in expected]
    nf4 = {"mp.frozen_weights": "nf4"}
    assert found[len(expected) :] == [(smallest, nf4), (smallest, nf4 | {"gc.offload": "cpu"})]


@pytest.mark.parametrize(
    ("training", "gc"),
    [
        ({"optimizer_in_backward": True, "max_grad_norm": math.inf}, {}),
        ({"compile": True}, {"policy": Policy.selective}),
    ],
)
def test_runs_that_go_with_few_others_are_refused_too(training: dict[str, Any], gc: dict[str, Any]) -> None:
    config = small_config()
    config = replace(config, training=replace(config.training, **training), gc=replace(config.gc, **gc))
    text = objection(config, SHORT, Capacity(0.1, 0, "a has 0.1"), TRAITS, WORKSPACE)
    assert str(text).startswith("baseline on small needs")
    assert "would need" in str(text)


def test_capacity_is_the_cards_or_what_is_free_or_the_limit() -> None:
    def capacity(gpu: GpuConfig, free_mib: float, limit_mib: int | None = None) -> Capacity:
        config = replace(small_config(), gpu=gpu, measure=MeasureConfig(limit_mib))
        return capacity_of(config, free_mib, "H200")

    real = replace(CARD, memory_mib=None, context_mib=0)
    libraries = 300  # come after free memory was asked for
    assert capacity(CARD, 5000) == Capacity(1000, 10, "a has 1,000")
    assert capacity(real, 1234.5) == Capacity(1234.5, libraries, "this H200 has 1,234 free")
    assert capacity(CARD, 5000, 500) == Capacity(500, 0, "measure.memory_limit_mib allows 500")
    assert capacity(CARD, 5000, 995) == Capacity(1000, 10, "a has 1,000")  # the context leaves no more
    assert capacity(CARD, 300) == Capacity(
        300, libraries, "this H200 has 300 free"
    )  # a shared card, smaller than the profile


def test_the_gpu_that_is_here_is_asked_and_the_run_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(OptimConfig(lora=True))
    assert objection_here(config, SHORT) is None  # no GPU is here
    cuda = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda: (40 * MIB, 50 * MIB))
    monkeypatch.setattr(fit, "torch", SimpleNamespace(cuda=cuda))  # PyTorch's own optimizers would ask the real one
    monkeypatch.setattr(fit, "profile_here", lambda gpu: replace(card("Card 1"), name="Card 1"))
    random_state = torch.get_rng_state()
    assert "but this Card 1 has 40 free" in str(objection_here(config, SHORT))
    assert torch.equal(torch.get_rng_state(), random_state)
    config.lora.targets = ["wx"]
    assert objection_here(config, SHORT) is None  # the run says so itself


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_runs_have_expandable_segments_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for each in process.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(each, raising=False)
    ours = process.child_environment(on_cpu=False)
    assert ours["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert ours["PATH"] == os.environ["PATH"]
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    theirs = process.child_environment(on_cpu=False)
    assert theirs.keys() & set(process.ALLOCATOR_VARIABLES) == {name}
    assert theirs[name] == "backend:cudaMallocAsync"
    monkeypatch.delenv(name)
    monkeypatch.setattr(process, "is_wsl", lambda: True)  # where the driver may lack the calls
    assert not process.child_environment(on_cpu=False).keys() & set(process.ALLOCATOR_VARIABLES)


def test_a_plan_that_fails_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = unittest.mock.Mock(samples=[], held_out=[])
    monkeypatch.setattr(fit, "objection_here", unittest.mock.Mock(side_effect=RuntimeError("no such kernel\nmore")))
    lines: list[str] = []
    child.refuse_what_does_not_fit(small_config(), dataset, lines.append)
    assert lines == ["could not check whether the run fits (no such kernel); it starts anyway"]
    monkeypatch.setattr(fit, "objection_here", lambda *_: "it needs more")
    with pytest.raises(UserError, match="it needs more"):
        child.refuse_what_does_not_fit(small_config(), dataset, lines.append)
