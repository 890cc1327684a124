"""The study of the KV cache: its claims fail where the cache is broken, and its numbers are those counted by hand."""

from typing import Any

import pytest
import torch
from helpers.models import small_model
from helpers.studies import failed
from torch import Tensor

from experiments import kv_cache as study
from experiments import kv_cache_runs as runs
from experiments.kv_cache import KVCacheOptions, Line
from experiments.shared import load_tiny, prompt_source
from llama_ft.decoding import state as decoding
from llama_ft.decoding.state import GenerationState
from llama_ft.measure.memory import MemoryTracker
from llama_ft.model.kv_cache import KVCache, LayerCache
from llama_ft.model.transformer import Transformer

BYTES_PER_TOKEN = 2 * 6 * 192 * 4  # tiny: keys and values, layers, width, fp32
WEIGHTS_BYTES = 4 * (2 * 2048 * 192 + 6 * (4 * 192 * 192 + 3 * 192 * 512 + 2 * 192) + 192)


@pytest.fixture(scope="module")
def tiny() -> Transformer:
    return load_tiny()


def random_prompts(length: int) -> list[list[int]]:
    return torch.randint(1, 101, (2, length), generator=torch.Generator().manual_seed(0)).tolist()


def failed_on(model: Transformer, line: Line) -> list[int]:
    """The claims that do not hold of this line alone: speed, growth, bytes, text."""
    measured = runs.measure_line(model, prompt_source(), line, (line.new,), 1)
    return failed(study, measured, speed=vars(line), growth=vars(line), exponent_gap=0.1)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@torch.no_grad()
def test_both_generations_take_the_most_probable_token_each_time(n_kv_heads: int) -> None:
    model, prompts = small_model(n_kv_heads).eval(), random_prompts(9)
    for generation in runs.generate_side_by_side(model, prompts, 40).values():
        assert len(generation.seconds) == 40
        for prompt, answer in zip(prompts, generation.tokens(), strict=True):
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
            assert answer == logits.argmax(-1).tolist()


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize(("length", "n_new"), [(40, 3), (3, 40)])
@torch.inference_mode()
def test_peak_memory_is_that_of_the_whole_generation(kv_cache: bool, length: int, n_new: int) -> None:
    model, prompts = small_model(2).eval(), random_prompts(length)
    with MemoryTracker(model, torch.optim.SGD(model.parameters())) as tracker:
        whole = runs.initial_state(model, prompts, n_new, kv_cache)
        for _ in range(n_new):
            whole.append(whole.next_logits().argmax(-1))
    peak = runs.peak_memory(model, prompts, n_new, kv_cache)
    assert peak == pytest.approx(tracker.result().peak_mib * 2**20, rel=0.005)


def test_bytes_are_those_counted_by_hand(quick: dict[str, Any]) -> None:
    assert quick["weights_bytes"] == WEIGHTS_BYTES
    for cell in quick["cells"]:
        by_hand = cell["batch"] * (cell["prompt"] + cell["new"]) * BYTES_PER_TOKEN * cell["kv_cache"]
        assert cell["cache_bytes"] == cell["closed_form_bytes"] == by_hand
        assert cell["peak_memory_bytes"] > WEIGHTS_BYTES + by_hand


def test_medians_and_exponents_of_known_numbers() -> None:
    assert runs.medians([[1.0, 5.0], [3.0, 4.0], [2.0, 9.0]]) == [2.0, 5.0]
    lengths = [1, 8, 16, 64, 100]
    for power in (1, 2):
        assert study._power({"new": lengths, "total_s": [0.3 * n**power for n in lengths]}) == pytest.approx(power)
    hiccup = [1e9, 1e9, *(n**1.5 for n in lengths[2:])]
    assert study._power({"new": lengths, "total_s": hiccup}) == pytest.approx(1.5)  # the short do not count


def test_a_cache_of_twice_the_size_fails(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(KVCache):
        def __init__(self, config, batch, tokens, *others) -> None:
            super().__init__(config, batch, 2 * tokens, *others)

    monkeypatch.setattr(decoding, "KVCache", Doubled)
    assert {2} <= set(failed_on(tiny, Line(1, 8, 16))) <= {0, 1, 2}


def test_a_cache_that_computes_all_again_fails(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    next_logits = GenerationState.next_logits

    def recomputed(self: GenerationState) -> Tensor:
        if self.cache is not None:
            for layer in self.cache.layers:
                layer.length = 0
        return next_logits(self)

    monkeypatch.setattr(GenerationState, "next_logits", recomputed)
    assert {0} <= set(failed_on(tiny, Line(1, 256, 16))) <= {0, 1}


def test_a_cache_that_mixes_up_its_tokens_fails(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = LayerCache.extend

    def mixed_up(self: LayerCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = extend(self, keys, values)
        return keys, values.flip(2)

    monkeypatch.setattr(LayerCache, "extend", mixed_up)
    assert 3 in failed_on(tiny, Line(2, 8, 16))


def test_time_that_grows_alike_fails(quick: dict[str, Any]) -> None:
    alike = [curve | {"total_s": [0.01 * n**1.4 for n in curve["new"]]} for curve in quick["curves"]]
    assert failed(study, quick, curves=alike) == [1]


def test_a_cache_that_holds_more_than_it_says_is_seen(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of all tensors made, not what the cache says of itself."""
    monkeypatch.setattr(KVCache, "nbytes", property(lambda self: 0))
    assert runs.cache_bytes(tiny, [[1, 2, 3]], 5) == 8 * BYTES_PER_TOKEN


def test_plans_have_their_lines() -> None:
    for options in (KVCacheOptions(), KVCacheOptions(quick=True), KVCacheOptions(complete=True)):
        plan = study.plan_of(options)
        assert {plan.speed, plan.growth} <= set(plan.lines)
        assert len(plan.lines) == len(set(plan.lines))
        assert all(line.new in plan.outputs and line.prompt + line.new <= 1024 for line in plan.lines)
    assert {(line.batch, line.prompt) for line in plan.lines} == {(b, p) for b in (1, 4) for p in (32, 96, 448)}
