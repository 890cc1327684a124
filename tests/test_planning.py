"""The planner's core: fake runs against real ones, operators against closed forms.

`test_allocator.py` has the model of CUDA's allocator, `test_plan_command.py` the command.
"""

import itertools
import math
import multiprocessing
import signal
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.planning import CPU_PROFILE, ON_CPU, ON_CUDA, SHORT, card, small_config
from helpers.training import COMBINATIONS, name, ragged_samples

from llama_ft.config import Dtype, OptimConfig, Optimizer, TrainConfig, TrainingConfig, UserError
from llama_ft.config.checks import Offload, Policy
from llama_ft.config.groups import MatrixRates
from llama_ft.config.techniques import Technique
from llama_ft.data.collate import collate
from llama_ft.data.records import Sample
from llama_ft.measure.memory import Event, MemoryTracker, MemoryUse
from llama_ft.measure.worst_case import hardest_windows, measure_worst_case
from llama_ft.planning import predict
from llama_ft.planning.allocator import ROUNDING
from llama_ft.planning.fake_run import (
    FlashAttentionMemory,
    as_fake,
    fake_run,
    fake_step,
    give_gradients,
    update,
    windows_of,
)
from llama_ft.planning.gpu_traits import Traits, relevant_traits, traits_of, workspace_bytes
from llama_ft.planning.operators import OperatorCounter, Operators, bound_by_resource, bytes_of, flops_of
from llama_ft.planning.processes import side_by_side
from llama_ft.planning.run_costs import interpolation_weights, knots, run_costs
from llama_ft.system import MIB
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.setup import set_up


def measured(config: TrainConfig, samples: list[Sample]) -> MemoryUse:
    """The memory of the real dry run, which `train` reports."""
    step = set_up(config, Precision.of(config, "cpu", has_bf16=True), torch.device("cpu"))
    return measure_worst_case(step, windows_of(config, samples, ON_CPU))


# Memory: the fake run against the real one


@pytest.mark.parametrize("optim", COMBINATIONS, ids=name)
def test_a_fake_run_needs_what_the_real_one_needs(optim: OptimConfig) -> None:
    config = replace(small_config(), optim=optim)
    config.ga.steps = 3
    assert fake_run(config, ragged_samples(), ON_CPU).use == measured(config, ragged_samples())


@pytest.mark.parametrize(
    ("on", "section", "key", "value"),
    [
        ("", "model", "n_kv_heads", 2),
        ("", "model", "qkv_bias", True),
        ("mp lora gc", "model", "qkv_bias", True),
        ("lora", "model", "qk_norm", True),
        ("mp gc", "model", "qk_norm", True),
        ("lora", "training", "micro_batch_size", 3),
        ("mp lora", "mp", "frozen_weights", Dtype.fp32),
        ("mp", "mp", "trainable_weights", Dtype.compute),
        ("neft", "neft", "alpha", 1.0),
        ("ga mp lora gc neft", "training", "packing", 45),
        ("gc", "gc", "policy", Policy.selective),
        ("ga mp lora gc", "gc", "policy", Policy.selective),
        ("gc", "gc", "offload", Offload.cpu),
        ("ga mp lora gc", "gc", "offload", Offload.cpu),
    ],
)
def test_so_do_runs_with_other_settings(on: str, section: str, key: str, value: object) -> None:
    config = small_config(**dict.fromkeys(on.split(), True))
    setattr(getattr(config, section), key, value)
    use = fake_run(config, ragged_samples(), ON_CPU).use
    assert use == measured(config, ragged_samples())
    assert sum(use.at_peak_mib.values()) == pytest.approx(use.peak_mib)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("on", ["", "ga mp", "mp lora gc"])
@pytest.mark.parametrize("weights", [Dtype.fp32, Dtype.compute])
def test_so_do_runs_with_sgd(on: str, momentum: float, weights: Dtype) -> None:
    config = small_config(**dict.fromkeys(on.split(), True))
    config.mp.trainable_weights, config.ga.steps = weights, 3
    config.training.optimizer, config.training.momentum, config.training.weight_decay = Optimizer.sgd, momentum, 0.1
    assert fake_run(config, ragged_samples(), ON_CPU).use == measured(config, ragged_samples())


@pytest.mark.parametrize("optim", COMBINATIONS, ids=name)
def test_so_do_runs_with_moments_in_8_bits(optim: OptimConfig) -> None:
    config = replace(small_config(), optim=optim, training=TrainingConfig(optimizer=Optimizer.adamw_8bit))
    config.ga.steps = 3
    use = fake_run(config, ragged_samples(), ON_CPU).use
    assert use == measured(config, ragged_samples())
    kept = {item.dtype: item.mib for item in use.breakdown if item.category == "optimizer_state"}
    if optim.lora:  # adapters of 1,024 values
        assert set(kept) == {"float32"}
    else:
        assert kept["uint8"] > 40 * kept["float32"]


IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": math.inf}


@pytest.mark.parametrize("optimizer", [Optimizer.adamw, Optimizer.adamw_8bit, Optimizer.sgd])
@pytest.mark.parametrize("on", ["", "gc", "mp gc", "lora"])
@pytest.mark.parametrize("tied", [False, True])
def test_so_do_runs_that_update_in_backward(optimizer: Optimizer, on: str, tied: bool) -> None:
    config = small_config(**dict.fromkeys(on.split(), True))
    config.model = replace(config.model, tie_word_embeddings=tied)
    config.training = TrainingConfig(optimizer=optimizer, **IN_BACKWARD)
    use = fake_run(config, ragged_samples(), ON_CPU).use
    assert use == measured(config, ragged_samples())
    assert sum(use.at_peak_mib.values()) == pytest.approx(use.peak_mib)
    assert use.at_peak_mib["other"] <= 0.05 * use.peak_mib
    config.training = TrainingConfig(optimizer=optimizer)
    assert use.peak_mib <= fake_run(config, ragged_samples(), ON_CPU).use.peak_mib


@pytest.mark.parametrize("optimizer", [Optimizer.adamw, Optimizer.adamw_8bit, Optimizer.sgd])
def test_fp16_with_its_scaler(optimizer: Optimizer) -> None:
    config = small_config(mp=True)
    config.mp.dtype, config.training.optimizer = Dtype.fp16, optimizer
    fake = fake_run(config, ragged_samples(), ON_CPU).use
    assert fake.peak_mib == pytest.approx(measured(config, ragged_samples()).peak_mib, abs=1024 / MIB)  # its scalars


def test_two_micro_batches_need_what_eight_need() -> None:
    config, samples, peaks = small_config(ga=True), [Sample.after([1] * 33, 5)] * 16, set()
    for config.ga.steps in (2, 8):
        real = measured(config, samples)
        assert fake_run(config, samples, ON_CPU).use == real
        peaks.add(real.peak_mib - real.at_peak_mib["other"])  # the batches' own tensors
    assert len(peaks) == 1


def comings_and_goings(events: list[Event]) -> list[list[int]]:
    """Sizes of storages that come one after the other, or go: those in any order."""
    runs = itertools.groupby(events, key=lambda event: event[1])
    sizes = [(sign, [storage.nbytes for storage, _, _ in run]) for sign, run in runs]
    return [each if sign > 0 else sorted(each) for sign, each in sizes]


@pytest.mark.parametrize("training", [{}, {"optimizer": Optimizer.adamw_8bit}, IN_BACKWARD], ids=str)
@pytest.mark.parametrize("optim", [optim for optim in COMBINATIONS if not optim.ga], ids=name)
def test_storages_come_and_go_as_in_two_steps_one_after_the_other(optim: OptimConfig, training: dict[str, Any]) -> None:
    """With gradient accumulation the micro-batches before the last are left out, which leave nothing but gradients."""
    config, samples = replace(small_config(), optim=optim), [Sample.after([1] * 33, 20)] * 3
    config.training = TrainingConfig(**training)
    planned = fake_run(config, samples, ON_CUDA).events
    (window,) = hardest_windows(windows_of(config, samples, ON_CUDA))
    with fake_step(config, ON_CUDA) as step:
        batches = [as_fake(batch) for batch in window]
        tensors = [tensor for batch in batches for tensor in batch.tensors]
        kernel = FlashAttentionMemory() if config.optim.mp else nullcontext()
        with MemoryTracker(step.model, step.optimizer, tensors, ROUNDING) as tracker, kernel:
            for _ in range(2):
                step(batches)
    assert comings_and_goings(planned) == comings_and_goings(tracker.events)


@pytest.mark.parametrize("optim", [COMBINATIONS[0], COMBINATIONS[-1]], ids=name)
def test_a_timeline_climbs_to_the_peak_and_ends_with_the_update(optim: OptimConfig) -> None:
    config = replace(small_config(), optim=optim)
    config.ga.steps = 2
    run = fake_run(config, [Sample.after([1] * 33, 5)] * 4, ON_CPU)
    points = predict.timeline(run.events, run.last_step)
    assert max(sum(point.memory_mib.values()) for point in points) == pytest.approx(run.use.peak_mib)
    assert list(dict.fromkeys(point.phase for point in points)) == ["forward", "backward", "optimizer step"]
    last = points[-1].memory_mib
    assert last["gradient"] == pytest.approx(last["optimizer_state"] / 2, abs=1e-2)  # fp32, and two moments
    assert (points[0].memory_mib["gradient"] > 0) == optim.ga  # accumulated before


def test_a_timeline_has_no_update_of_its_own_where_weights_are_updated_in_backward() -> None:
    config = replace(small_config(), training=TrainingConfig(**IN_BACKWARD))
    run = fake_run(config, [Sample.after([1] * 33, 5)] * 4, ON_CPU)
    points = predict.timeline(run.events, run.last_step)
    assert max(sum(point.memory_mib.values()) for point in points) == pytest.approx(run.use.peak_mib)
    assert list(dict.fromkeys(point.phase for point in points)) == ["forward", "backward"]
    assert points[-1].memory_mib["gradient"] < run.use.max_mib["gradient"]
    assert run.use.max_mib["gradient"] == config.model.vocab_size * config.model.dim * 4 / MIB  # the largest weight's


# What a card changes


def made(config: TrainConfig, samples: list[Sample], traits: Traits) -> list[Any]:
    """The storages that the last step makes."""
    run = fake_run(config, samples, traits)
    return [storage for storage, sign, _ in run.events[run.last_step :] if sign > 0]


def test_on_a_card_each_storage_is_rounded_up() -> None:
    on_cpu, on_card = (fake_run(small_config(), ragged_samples(), traits) for traits in (ON_CPU, ON_CUDA))
    more = (on_card.use.max_mib["parameter"] - on_cpu.use.max_mib["parameter"]) * MIB
    n_parameters = 3 + 9 * 2
    assert 0 <= more < n_parameters * ROUNDING
    assert all(storage.nbytes % ROUNDING == 0 for storage, _, _ in on_card.events)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_flash_attention_takes_fp32_sums_and_gradients_of_grouped_heads(
    n_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, samples = small_config(mp=True), [Sample.after([1] * 201, 5)]
    config.model = replace(config.model, n_kv_heads=n_kv_heads)
    with_kernel = Counter(storage.nbytes for storage in made(config, samples, ON_CUDA))
    monkeypatch.setattr("llama_ft.planning.fake_run.FLASH_BACKWARD", None)
    without = Counter(storage.nbytes for storage in made(config, samples, ON_CUDA))
    n_layers = config.model.n_layers
    taken = Counter({4 * 256 * 4: n_layers, 4 * 256 * 32 * 4: n_layers})  # heads x 200 in blocks of 128, x head_dim
    if n_kv_heads < 4:
        taken[200 * config.model.dim * 2] = 2 * n_layers
    assert with_kernel - without == taken
    assert not without - with_kernel


def test_dropout_on_a_card_keeps_a_byte_a_value() -> None:
    config, samples = small_config(lora=True), [Sample.after([1] * 33, 5)]
    masks = [
        sum(storage.nbytes for storage in made(config, samples, traits) if storage.dtype == torch.bool)
        for traits in (ON_CPU, ON_CUDA)
    ]
    assert masks == [0, 2 * config.model.n_layers * 32 * config.model.dim]  # of wq and wv: 32 positions


def test_grouped_queries_cost_repeated_keys_and_values_where_no_kernel_takes_them() -> None:
    """And no S x S scores: on CUDA the memory-efficient kernel takes what is repeated."""
    multi_head, grouped, samples = small_config(), small_config(), [Sample.after([1] * 65, 5)]
    grouped.model = replace(grouped.model, n_kv_heads=1)
    older = Traits(on_cuda=True, has_bf16=False)

    def kept(config, traits) -> float:
        return fake_run(config, samples, traits).use.max_mib["activation"]

    one_head = 2 * 64 * grouped.model.head_dim * 4 / MIB  # keys and values of a layer, S = 64, in fp32
    saved = grouped.model.n_layers * (grouped.model.n_heads - 1) * one_head
    assert kept(multi_head, ON_CPU) - kept(grouped, ON_CPU) > 0.8 * saved
    assert kept(multi_head, ON_CUDA) - kept(grouped, ON_CUDA) < 0.2 * saved
    assert [ON_CUDA.repeats_keys(True), ON_CUDA.repeats_keys(False), older.repeats_keys(True)] == [False, True, True]


def test_what_a_profile_says_of_its_card() -> None:
    older = Traits(on_cuda=True, has_bf16=False)
    assert traits_of(card(capability="7.5")) == older
    assert traits_of(card(capability="8.6")) == ON_CUDA
    assert traits_of(CPU_PROFILE) == ON_CPU
    assert workspace_bytes(card(capability="8.0")) == 2 * 8_519_680
    for capability in ("9.0", "10.0", "12.0"):
        assert workspace_bytes(card(capability=capability)) == 2 * 32 * MIB
    assert workspace_bytes(CPU_PROFILE) == 0
    # An fp32 run cannot tell these cards apart.
    assert relevant_traits(older, small_config()) == ON_CUDA
    assert relevant_traits(older, small_config(mp=True)) == older


# Rows


def test_bf16_on_a_card_without_it_is_a_row_with_an_error() -> None:
    config = small_config()
    config.mp.dtype = Dtype.bf16
    fp32, bf16 = predict.predict(
        [config, replace(config, optim=OptimConfig(mp=True))], [card(capability="7.5")], [(20, 5)]
    )
    assert "bf16 is not supported" in str(bf16.error)
    assert bf16.peak_memory_mib is bf16.fits is None
    assert fp32.error is None
    assert fp32.fits


def test_a_row_adds_the_cards_own_terms() -> None:
    config, small = small_config(), card(context_mib=100)
    row, other = predict.predict([config], [small, card("hopper", capability="9.0")], [(20, 5)])
    assert row.peak_memory_mib is not None
    assert row.reserved_mib is not None
    assert sum(row.memory_mib.values()) == pytest.approx(row.peak_memory_mib)  # type: ignore[union-attr]
    assert sum(item.mib for item in row.breakdown) == pytest.approx(row.peak_memory_mib)
    assert row.required_mib == row.reserved_mib + 100
    assert row.margin_mib == 1000 - row.required_mib
    assert other.peak_memory_mib - row.peak_memory_mib == pytest.approx(64 - 16.25)  # type: ignore[operator]
    assert row.reserved_mib >= row.peak_memory_mib
    exact = int(row.required_mib)  # reserved memory is in whole pages
    for memory_mib, fits in ((exact, True), (exact - 1, False)):
        (row,) = predict.predict([config], [replace(small, memory_mib=memory_mib)], [(20, 5)])
        assert row.fits is fits


@pytest.mark.parametrize("changes_operators", [True, False])
def test_another_technique_has_fake_steps_of_its_own(changes_operators: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Technique("other", "Other", "another one", None, changes_operators, in_course=False)
    monkeypatch.setattr(predict, "TECHNIQUES", [*predict.TECHNIQUES, other])
    without, using = small_config(), small_config(ga=True)
    without.optim.other, using.optim.other = False, True
    assert (predict._key(without, card()) == predict._key(using, card())) is not changes_operators


# Operators


def test_flops_of_a_step_are_those_of_its_matrix_products() -> None:
    """Forward 2 FLOPs a weight and token, backward twice that, but none for the input of the first products."""
    config, n_tokens, n_targets = small_config(), 32, 7
    model = config.model
    (costs,) = run_costs([config], [Sample.after([1] * (n_tokens + 1), n_tokens + 1 - n_targets)], ON_CUDA)
    per_layer = 4 * model.dim**2 + 3 * model.dim * model.ffn_dim
    of_weights = 6 * (per_layer * model.n_layers * n_tokens + model.dim * model.vocab_size * n_targets)
    # One product of S (S + 1) / 2 causal scores, all heads; there are 2 in forward and 5 in backward.
    scores = n_tokens * (n_tokens + 1) * model.dim
    assert flops_of(costs.operators) == {"float32": pytest.approx(of_weights + 7 * scores * model.n_layers)}


def counted(config: TrainConfig, windows: list[list[Sample]]) -> list[Operators]:
    """The operators of each optimizer step."""
    counters = []
    with fake_step(config, ON_CUDA) as step:
        padding = windows_of(config, [], ON_CUDA).padding
        step([as_fake(collate([windows[0][0]], padding))])  # makes the optimizer's state
        for window in windows:
            counters.append(OperatorCounter())
            with counters[-1]:
                step([as_fake(collate([sample], padding)) for sample in window])
    return [counter.operators for counter in counters]


@pytest.mark.parametrize(
    ("on", "n_layers", "every", "policy"),
    [
        ("ga", 5, 1, Policy.full),
        ("mp lora gc ga", 5, 1, Policy.full),
        ("gc", 6, 2, Policy.full),
        ("mp lora gc", 5, 1, Policy.selective),
    ],
)
def test_costs_of_a_whole_run_are_those_of_its_steps_counted_one_by_one(
    on: str, n_layers: int, every: int, policy: Policy
) -> None:
    config = small_config(**dict.fromkeys(on.split(), True))
    config.model = replace(config.model, n_layers=n_layers)
    config.ga.steps, config.gc.every, config.gc.policy, config.gc.offload = 2, every, policy, Offload.cpu
    samples = [Sample.after([1] * 33, 33 - 8)] * 6  # of one shape: nothing is interpolated
    (costs,) = run_costs([config], samples, ON_CUDA)
    (step,) = counted(config, [samples[: config.accumulation_steps]])
    assert costs.steps == (3 if config.optim.ga else 6)
    assert flops_of(costs.operators) == {
        dtype: pytest.approx(flops * costs.steps) for dtype, flops in flops_of(step).items()
    }
    assert bytes_of(costs.operators) == pytest.approx(bytes_of(step) * costs.steps, rel=1e-3)


def test_costs_of_ragged_samples_lie_close_to_those_counted_one_by_one() -> None:
    (costs,) = run_costs([small_config()], ragged_samples(), ON_CUDA)
    steps = counted(small_config(), [[sample] for sample in ragged_samples()])
    flops = sum(flops_of(step)["float32"] for step in steps)
    assert flops_of(costs.operators)["float32"] == pytest.approx(flops, rel=0.02)  # attention's part is quadratic
    assert bytes_of(costs.operators) == pytest.approx(sum(map(bytes_of, steps)), rel=0.02)


@pytest.mark.parametrize(
    ("optimizer", "momentum", "n_bytes"),
    [
        (Optimizer.adamw, 0.9, 4 * (5 + 2 * 2)),
        (Optimizer.sgd, 0.9, 4 * (5 + 2 * 1)),
        (Optimizer.sgd, 0.0, 4 * 5),
        # The gradient is read once by the update, and once more and written where it is clipped; scales of 256 moments.
        (Optimizer.adamw_8bit, 0.9, 4 * 6 + 2 * 2 * (1 + 4 / 256)),
        (Optimizer.paged_adamw_8bit, 0.9, 4 * 6 + 2 * 2 * (1 + 4 / 256)),
    ],
)
def test_bytes_of_an_update_are_those_of_its_optimizer(optimizer: Optimizer, momentum: float, n_bytes: float) -> None:
    """Fused, it reads and writes weight, gradient, which it scales, and moments; AdamW has two: 8 x 4 bytes a weight.

    Clipping reads each gradient once more, for its norm.
    """
    config = small_config()
    config.training.optimizer, config.training.momentum = optimizer, momentum
    with fake_step(config, ON_CUDA) as step:
        n_weights = sum(p.numel() for p in step.model.parameters())
        for counter in (OperatorCounter(), OperatorCounter()):  # the first makes the optimizer's state
            give_gradients(step)
            with counter:
                update(step)
    assert bytes_of(counter.operators) == pytest.approx(n_bytes * n_weights, rel=0.005)


def test_paged_moments_are_no_part_of_a_cards_memory() -> None:
    """Those of the two weights with 100,000 elements or more; a note says how much they are."""
    rows = []
    for optimizer in (Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit):
        config = replace(small_config(), training=TrainingConfig(optimizer=optimizer))
        rows += predict.predict([config], [card()], SHORT)
    moments = 2 * 2 * config.model.vocab_size * config.model.dim / MIB
    assert [row.managed_mib for row in rows] == [None, moments]
    state, less = (row.memory_max_mib["optimizer_state"] for row in rows)
    assert state - less == pytest.approx(moments)
    (row,) = predict.predict([config], [CPU_PROFILE], SHORT)
    assert "training.optimizer=adamw_8bit" in str(row.error)


def test_costs_are_equal_whether_weights_are_updated_in_backward_or_after_it() -> None:
    """But for the scaling of gradients, which are not clipped there: fused, they are written once less."""
    config, costs = small_config(), []
    for training in (TrainingConfig(), TrainingConfig(**IN_BACKWARD)):
        costs += run_costs([replace(config, training=training)], ragged_samples(), ON_CUDA)
    assert flops_of(costs[0].operators) == flops_of(costs[1].operators)
    assert bytes_of(costs[0].operators) == pytest.approx(bytes_of(costs[1].operators), rel=1e-3)


def test_knots_are_values_and_weights_sum_to_their_number() -> None:
    values = [3, 9, 9, 4, 30, 12]
    at = knots(values)
    assert at == [3, 9, 30]
    weights = interpolation_weights(values, at)
    assert sum(weights) == pytest.approx(len(values))
    # Exact for what is linear.
    assert sum(w * x for w, x in zip(weights, at, strict=True)) == pytest.approx(sum(values))
    assert interpolation_weights([5, 5], knots([5, 5])) == [2]


def test_the_bound_takes_the_slower_resource_of_each_operator() -> None:
    rates = {"bandwidth_gb_s": 100.0, "tflops": MatrixRates(fp32=1.0, bf16=2.0)}
    operators: Operators = Counter({("float32", 2e12, 1e9): 3, ("bfloat16", 2e9, 1e9): 1, ("", 0.0, 5e10): 2})
    seconds = bound_by_resource(operators, card(**rates))
    assert seconds == {"memory": pytest.approx(0.01 + 1.0), "fp32": pytest.approx(6.0)}
    assert bound_by_resource(operators, card()) is None
    assert bound_by_resource(operators, card(**rates | {"tflops": MatrixRates(fp32=1.0)})) is None


# Processes


def test_an_interrupt_does_not_wait_for_what_runs() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def wait_for_both() -> None:
        signal.setitimer(signal.ITIMER_REAL, 3)
        list(side_by_side(time.sleep, dict.fromkeys(range(2), (120,))))

    earlier = signal.signal(signal.SIGALRM, interrupt)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_for_both()
    finally:
        signal.signal(signal.SIGALRM, earlier)
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []


def test_an_error_of_a_job_is_passed_on_without_the_other_processs_traceback() -> None:
    config = small_config(lora=True)
    config.lora.targets = ["wx"]
    with pytest.raises(UserError, match="no linear layer is named wx") as caught:
        predict.predict([config, replace(config, optim=OptimConfig(lora=True, gc=True))], [card()], SHORT)
    assert caught.value.__cause__ is None
