"""Traces: a run's storages and operators as formulas, compared with the planner's own at other sizes."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_ft.bitsandbytes import is_installed
from llama_ft.config import (
    DataConfig,
    Dtype,
    MixedPrecisionConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Strategy,
    TrainConfig,
)
from llama_ft.config.techniques import GradientAccumulationConfig, LoraConfig
from llama_ft.config.training import Optimizer, TrainingConfig
from llama_ft.measure.memory import Allocation, Event, bytes_alive
from llama_ft.planning.allocator import reserved_bytes, rounded
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.layers import DEPTHS, DoesNotRepeat, Section, split
from llama_ft.planning.lengths import blank_samples
from llama_ft.planning.operator_formulas import Cost, costs
from llama_ft.planning.operators import LINK, bytes_of, flops_of, sent_of
from llama_ft.planning.run_costs import run_costs
from llama_ft.planning.symbols import SYMBOLS, Symbols, Term, collected
from llama_ft.planning.trace import PLACES, Trace, trace
from llama_ft.planning.variants import Variant, structure_of

# Large enough that nothing left out of a trace counts, and with a number of layers that no trace was made from.
MODEL = ModelConfig("other", 1024, 7, 16, 16, 2816, 16_000, 2048)
GROUPED = replace(MODEL, n_kv_heads=4)
RANK, LENGTH, SAMPLES, GA_STEPS = 12, 300, 3, 4

CASES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "ga": {"on": ["ga"]},
    "lora gc": {"on": ["lora", "gc"]},
    "ga mp": {"on": ["ga", "mp"], "model": GROUPED},
    "mp lora": {"on": ["mp", "lora"]},
    "ga mp lora gc": {"on": ["ga", "mp", "lora", "gc"], "model": GROUPED},
    "mp lora fp32": {"on": ["mp", "lora"], "mp": MixedPrecisionConfig(frozen_weights=Dtype.fp32)},
    "mp 16 bit": {"on": ["mp", "gc"], "mp": MixedPrecisionConfig(trainable_weights=Dtype.compute)},
    "tied": {"on": ["mp"], "model": replace(GROUPED, tie_word_embeddings=True)},
    "biases": {"on": ["mp", "gc"], "model": replace(GROUPED, qkv_bias=True)},
    "norms": {"on": ["mp", "lora"], "model": replace(GROUPED, qk_norm=True)},
    "fp16": {"on": ["mp", "lora"], "model": GROUPED, "has_bf16": False},
    "packed": {"on": ["mp", "lora"], "packed": True},
    "packed ga gc": {"on": ["ga", "mp", "gc"], "packed": True, "model": GROUPED},
    "fsdp": {"processes": 4},
    "fsdp mp lora gc": {"on": ["mp", "lora", "gc"], "processes": 2, "model": GROUPED},
    "fsdp ga mp": {"on": ["ga", "mp"], "processes": 2},
    "fsdp mp 16 bit": {
        "on": ["mp"],
        "mp": MixedPrecisionConfig(trainable_weights=Dtype.compute),
        "processes": 3,
        "model": GROUPED,
    },
    "fsdp fp32": {
        "on": ["mp", "lora"],
        "mp": MixedPrecisionConfig(frozen_weights=Dtype.fp32, trainable_weights=Dtype.compute),
        "processes": 2,
        "model": replace(GROUPED, qkv_bias=True),
    },
    "fsdp nf4": {
        "on": ["mp", "lora"],
        "mp": MixedPrecisionConfig(frozen_weights=Dtype.nf4),
        "processes": 2,
        "quant": True,
    },
    "8 bit biases": {
        "on": ["mp"],
        "optimizer": Optimizer.adamw_8bit,
        "model": replace(GROUPED, qkv_bias=True),
        "quant": True,
    },
    "8 bit": {"on": ["mp"], "optimizer": Optimizer.adamw_8bit, "quant": True},
    "nf4": {"on": ["mp", "lora"], "mp": MixedPrecisionConfig(frozen_weights=Dtype.nf4), "quant": True},
    "nf4 gc": {
        "on": ["ga", "mp", "lora", "gc"],
        "mp": MixedPrecisionConfig(frozen_weights=Dtype.nf4, double_quantization=False),
        "quant": True,
    },
}
needs_quant = pytest.mark.skipif(not is_installed(), reason="bitsandbytes is not installed")
PARAMETERS = [pytest.param(name, marks=needs_quant) if "quant" in CASES[name] else name for name in CASES]


def variant_of(case: dict[str, Any]) -> Variant:
    on = OptimConfig(**dict.fromkeys(case.get("on", []), True))
    is_split, packed = case.get("processes", 1) > 1, case.get("packed", False)
    mp, optimizer = case.get("mp", MixedPrecisionConfig()), case.get("optimizer", Optimizer.adamw)
    structure = structure_of(case.get("model", MODEL))
    return Variant(structure, case.get("has_bf16", True), is_split, packed, on, mp, optimizer)


def config_of(case: dict[str, Any]) -> TrainConfig:
    """The run of a case at the sizes of this file."""
    variant, processes = variant_of(case), case.get("processes", 1)
    packing = SAMPLES * (LENGTH - 1) if variant.packed else None
    steps = GA_STEPS * processes if variant.optim.ga else 1
    size = SAMPLES if variant.optim.ga else SAMPLES * processes
    return TrainConfig(
        case.get("model", MODEL),
        "random",
        "no.model",
        variant.optim,
        data=DataConfig("sample"),
        ga=GradientAccumulationConfig(steps),
        mp=variant.mp,
        lora=LoraConfig(rank=RANK),
        training=TrainingConfig(micro_batch_size=size, packing=packing, optimizer=variant.optimizer),
        parallel=ParallelConfig(Strategy.fsdp, processes) if processes > 1 else ParallelConfig(),
    )


def sizes_of(case: dict[str, Any]) -> dict[str, int]:
    model, tokens = case.get("model", MODEL), LENGTH - 1
    sizes = {
        "dim": model.dim,
        "ffn": model.ffn_dim,
        "vocab": model.vocab_size,
        "heads": model.n_heads,
        "kv_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "rank": RANK,
        "context": model.max_seq_len,
        "samples": SAMPLES,
        "tokens": tokens,
        "targets": tokens,
        "rows": tokens + 128 if case.get("packed") else 384,
        "processes": case.get("processes", 1),
        "layers": model.n_layers,
    }
    assert set(sizes) == set(SYMBOLS)
    return sizes


def lengths_of(config: TrainConfig) -> list[tuple[int, int]]:
    return [(LENGTH, 1)] * config.training.micro_batch_size * config.accumulation_steps


def events_of(made: Trace, sizes: dict[str, int], n_layers: int) -> list[Event]:
    """The log of a run of these sizes, as if it had been tracked on a card."""
    n_bytes = [rounded(round(sum(term.at(sizes) for term in kind.n_bytes))) for kind in made.kinds]
    live: dict[int, list[Allocation]] = defaultdict(list)
    events: list[Event] = []
    for section in made.sections:
        for number in section.once + section.layer * (n_layers - DEPTHS[0]):
            place, index = divmod(abs(number) - 1, PLACES)
            if number > 0:
                kind = made.kinds[index]
                live[index].append(Allocation(n_bytes[index], getattr(torch, kind.dtype), kind.category))
                events.append((live[index][-1], 1, section.phase))
            else:
                events.append((live[index].pop(place // 2 if place % 2 else -1 - place // 2), -1, section.phase))
    return events


def highest(events: list[Event]) -> dict[str, int]:
    """The bytes alive at the peak, by category."""
    alive = bytes_alive(events)
    totals = [sum(now) for now in zip(*alive.values(), strict=True)]
    peak = totals.index(max(totals))
    return {name: series[peak] for name, series in alive.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_trace_has_the_memory_of_a_run_of_any_size(name: str) -> None:
    case = CASES[name]
    variant, config = variant_of(case), config_of(case)
    traits = Traits(True, variant.has_bf16)
    made = events_of(trace(variant.config, traits, variant.symbols), sizes_of(case), config.model.n_layers)
    events = fake_run(config, blank_samples(lengths_of(config)), traits).events
    ours, theirs = highest(made), highest(events)
    total = sum(theirs.values())
    assert sum(ours.values()) == pytest.approx(total, rel=2e-3)
    for category, n_bytes in theirs.items():
        assert ours[category] == pytest.approx(n_bytes, abs=2e-3 * total), category
    assert reserved_bytes(made) == pytest.approx(reserved_bytes(events), rel=5e-3, abs=20 * 2**20)


def totals(parts: list[tuple[list[Cost], float]], sizes: dict[str, int], n_layers: int) -> tuple[float, float, float]:
    """FLOPs, bytes and bytes sent of parts of a step, each as often as its number says."""
    flops = n_bytes = sent = 0.0
    for found, times in parts:
        for cost in found:
            count = times * (cost.count + cost.per_layer * n_layers)
            moved = count * sum(term.at(sizes) for term in cost.n_bytes)
            if cost.dtype == LINK:
                sent += moved * (1 - 1 / sizes["processes"])
                continue
            n_bytes += moved
            if cost.flops:
                is_attention = cost.flops.powers[SYMBOLS.index("tokens")] > 1
                share = (sizes["tokens"] + 1) / (2 * sizes["tokens"]) if is_attention else 1.0
                flops += count * share * cost.flops.at(sizes)
    return flops, n_bytes, sent


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_formulas_of_operators_give_the_costs_of_a_run_of_any_size(name: str) -> None:
    case = CASES[name]
    variant, config = variant_of(case), config_of(case)
    traits = Traits(True, variant.has_bf16)
    found = costs(variant.config, traits, variant.symbols)
    steps = GA_STEPS if variant.optim.ga else 1
    parts = [(found["micro_batch"], float(steps)), (found["accumulated"], steps - 1.0), (found["update"], 1.0)]
    flops, n_bytes, sent = totals(parts, sizes_of(case), config.model.n_layers)
    (expected,) = run_costs([config], blank_samples(lengths_of(config)), traits)
    assert flops == pytest.approx(sum(flops_of(expected.operators).values()), rel=1e-6)
    assert n_bytes == pytest.approx(bytes_of(expected.operators), rel=5e-3)
    assert sent == pytest.approx(sent_of(expected.operators), rel=5e-3)


POWERS = {name: st.integers(0, 2) for name in SYMBOLS if name not in ("rows", "processes", "layers")}


@given(st.fixed_dictionaries(POWERS), st.sampled_from([0.5, 1.0, 2.0, 4.0, 10.0]), st.booleans())
def test_a_product_of_sizes_is_read_off_its_value(powers: dict[str, int], factor: float, grouped: bool) -> None:
    symbols = Symbols(grouped)
    if not grouped:
        powers = powers | {"kv_heads": 0}
    term = Term(factor, tuple(powers.get(name, 0) for name in SYMBOLS))
    value = 512 * term.at(symbols.sizes)
    if value < 2**53 and value == int(value):
        assert symbols.term(int(value)) == Term(512 * factor, term.powers)


def test_a_share_of_a_process_is_read_off_its_value() -> None:
    symbols = Symbols(True, is_split=True)
    sizes = symbols.sizes
    (found,) = collected([symbols.term(4 * sizes["dim"] * sizes["ffn"] // sizes["processes"]) or Term(0, ())])
    assert found.factor == 4
    assert dict(zip(SYMBOLS, found.powers, strict=True)) == dict.fromkeys(SYMBOLS, 0) | {
        "dim": 1,
        "ffn": 1,
        "processes": -1,
    }


def test_a_sum_is_no_product() -> None:
    sizes = Symbols(True).sizes
    assert Symbols(True).term(sizes["dim"] + sizes["ffn"]) is None


def unrolled(sections: Iterable[Section], layers: int) -> list[int]:
    """The events of a phase with this many layers more than the shallow run."""
    return [number for each in sections for number in each.once + each.layer * layers]


def test_a_layer_is_what_the_deeper_run_has_more() -> None:
    one, two, three, nine = ((n,) for n in (1, 2, 3, 9))
    found = list(split("forward", [one, two, three, nine], [one, two, three, two, three, nine]))
    for n in range(4):
        assert unrolled(found, n) == [1, 2, 3, *[2, 3] * n, 9]
    assert list(split("forward", [one, two], [one, two])) == [Section("forward", (1, 2), ())]
    with pytest.raises(DoesNotRepeat, match="the forward does not repeat"):
        list(split("forward", [one, two, three], [two, three, one, two]))


def test_layers_may_add_to_several_places() -> None:
    short, long = [(1,), (2,), (5,), (3,), (-3,)], [(1,), (1,), (2,), (5,), (3,), (4,), (3,), (-3,)]
    with pytest.raises(DoesNotRepeat):
        list(split("backward", short, long[:-1]))
    found = list(split("backward", short, long))
    assert unrolled(found, 2) == [1, 1, 1, 2, 5, 3, 4, 3, 4, 3, -3]
    assert [len(each.layer) for each in found] == [1, 2, 0]


def test_what_is_freed_at_once_for_all_layers_is_a_section_of_its_own() -> None:
    short, long = [(5,), (-1, -1, -2), (6,)], [(5,), (-1, -1, -1, -2, -2), (6,)]
    assert list(split("backward", short, long)) == [
        Section("backward", (5, -1, -1, -2), (-1, -2)),
        Section("backward", (6,), ()),
    ]


def test_cards_without_bf16_have_traces_of_their_own() -> None:
    with_flash, without = (variant_of(CASES["mp lora"] | {"has_bf16": has_bf16}) for has_bf16 in (True, False))
    assert with_flash.key != without.key
