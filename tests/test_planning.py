"""The planner's core: fake runs against real ones, operators against closed forms, the allocator against cases by hand.

`test_plan_command.py` has the command.
"""

import itertools
import multiprocessing
import signal
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.training import COMBINATIONS, make_step, name, ragged_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import KB

from llama_ft.config import DeviceChoice, DtypeChoice, GpuConfig, MatrixRates, TrainConfig, UserError, WeightStorage
from llama_ft.data.collate import Padding, collate
from llama_ft.data.dataset import Sample
from llama_ft.launch.run import track_memory
from llama_ft.measure.memory import Event, MemoryTracker, MemoryUse
from llama_ft.measure.worst_case import hardest_windows
from llama_ft.planning import cuda_kernels
from llama_ft.planning.allocator import LARGE_PAGE, ROUNDING, SMALL_PAGE, Allocator, rounded
from llama_ft.planning.cuda_kernels import FlashAttentionMemory
from llama_ft.planning.fake_run import as_fake, fake_run, fake_step, give_gradients, padding_of, update
from llama_ft.planning.gpu_traits import Traits, relevant_traits, traits_of, workspace_bytes
from llama_ft.planning.operators import OperatorCounter, bytes_of, flops_of
from llama_ft.planning.predict import predict, processes
from llama_ft.planning.roofline import by_resource
from llama_ft.planning.run_costs import nodes, run_costs, weights
from llama_ft.planning.timeline import timeline
from llama_ft.system import MIB

ON_CPU = Traits(on_cuda=False, has_bf16=True, has_flash=True)
ON_CUDA = Traits(on_cuda=True, has_bf16=True, has_flash=True)


def with_optim(config: TrainConfig, toggles: tuple[bool, ...]) -> TrainConfig:
    ga, mp, lora, gc = toggles
    return replace(config, optim=replace(config.optim, ga=ga, mp=mp, lora=lora, gc=gc))


def measured(config: TrainConfig, samples: list[Sample], toggles: tuple[bool, ...]) -> MemoryUse:
    """The memory of the real rehearsal, which `train` reports."""
    step, accumulation = make_step(config, toggles)
    padding = Padding(step.precision.pad_multiple, config.model.max_seq_len)
    return track_memory(step, hardest_windows(samples, config.training.micro_batch_size, accumulation, padding))


# Memory: the fake run against the real one


@pytest.mark.parametrize("toggles", COMBINATIONS, ids=name)
def test_a_fake_run_needs_what_the_real_one_needs(small_config: TrainConfig, toggles: tuple[bool, ...]) -> None:
    small_config.ga.steps = 3
    samples = ragged_samples()
    real = measured(small_config, samples, toggles)
    fake = fake_run(with_optim(small_config, toggles), samples, ON_CPU).use
    assert fake == real


def test_two_micro_batches_need_what_eight_need(small_config: TrainConfig) -> None:
    toggles, samples = (True, False, False, False), [Sample([1] * 33, 5)] * 16
    peaks = {}
    for n_micro_batches in (2, 8):
        small_config.ga.steps = n_micro_batches
        real = measured(small_config, samples, toggles)
        assert fake_run(with_optim(small_config, toggles), samples, ON_CPU).use == real
        peaks[n_micro_batches] = real.peak_mib - real.at_peak_mib["other"]  # the batches' own tensors
    assert peaks[2] == peaks[8]


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_of_several_samples(small_config: TrainConfig, micro_batch_size: int) -> None:
    small_config.training.micro_batch_size = micro_batch_size
    samples = ragged_samples()
    toggles = (False, False, True, False)
    assert fake_run(with_optim(small_config, toggles), samples, ON_CPU).use == measured(small_config, samples, toggles)


def test_grouped_queries(small_config: TrainConfig) -> None:
    small_config.model = replace(small_config.model, n_kv_heads=2)
    toggles = (False, False, False, False)
    samples = ragged_samples()
    assert fake_run(with_optim(small_config, toggles), samples, ON_CPU).use == measured(small_config, samples, toggles)


def test_fp16_with_its_scaler(small_config: TrainConfig) -> None:
    small_config.mp.dtype = DtypeChoice.fp16
    toggles = (False, True, False, False)
    samples = ragged_samples()
    real, fake = measured(small_config, samples, toggles), fake_run(with_optim(small_config, toggles), samples, ON_CPU)
    assert fake.use.peak_mib == pytest.approx(real.peak_mib, abs=1 * KB)  # the scaler's scalars


# What a card changes


def test_on_a_card_each_storage_is_rounded_up(small_config: TrainConfig) -> None:
    on_cpu, on_card = (fake_run(small_config, ragged_samples(), traits) for traits in (ON_CPU, ON_CUDA))
    n_parameters = sum(1 for _ in make_step(small_config, (False,) * 4)[0].model.parameters())
    more = (on_card.use.max_mib["parameter"] - on_cpu.use.max_mib["parameter"]) * MIB
    assert 0 < more < n_parameters * ROUNDING
    assert all(storage.nbytes % ROUNDING == 0 for storage, _, _ in on_card.events)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_flash_attention_takes_fp32_sums_and_gradients_of_grouped_heads(
    small_config: TrainConfig,
    n_kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = with_optim(small_config, (False, True, False, False))
    config.model = replace(config.model, n_heads=4, n_kv_heads=n_kv_heads)

    def made() -> Counter[int]:
        run = fake_run(config, [Sample([1] * 201, 5)], ON_CUDA)
        return Counter(storage.nbytes for storage, sign, _ in run.events[run.last_step :] if sign > 0)

    with_kernel = made()
    monkeypatch.setattr(cuda_kernels, "FLASH_BACKWARD", None)
    n_layers = config.model.n_layers
    taken = Counter({4 * 256 * 4: n_layers, 4 * 256 * 32 * 4: n_layers})  # heads x 200 in blocks of 128, x head_dim
    if n_kv_heads < 4:
        taken[200 * config.model.dim * 2] = 2 * n_layers
    without = made()
    assert with_kernel - without == taken
    assert not without - with_kernel


def test_dropout_on_a_card_keeps_a_byte_a_value(small_config: TrainConfig) -> None:
    config = with_optim(small_config, (False, False, True, False))
    samples = [Sample([1] * 33, 5)]
    kept = 2 * config.model.n_layers * 32 * config.model.dim  # of wq and wv: 32 positions
    masks = {}
    for traits in (ON_CPU, ON_CUDA):
        run = fake_run(config, samples, traits)
        made = [storage for storage, sign, _ in run.events[run.last_step :] if sign > 0]
        masks[traits] = sum(storage.nbytes for storage in made if storage.dtype == torch.bool)
    assert masks == {ON_CPU: 0, ON_CUDA: kept}


def test_attention_without_a_sparing_kernel_keeps_its_matrices(small_config: TrainConfig) -> None:
    grouped = replace(small_config, model=replace(small_config.model, n_kv_heads=1))
    samples = [Sample([1] * 65, 5)]
    spared, kept = fake_run(small_config, samples, ON_CUDA).use, fake_run(grouped, samples, ON_CUDA).use
    matrices = grouped.model.n_layers * grouped.model.n_heads * 64 * 64 * 4 / MIB  # softmax, fp32, S = 64
    assert kept.max_mib["activation"] - spared.max_mib["activation"] > 0.9 * matrices
    assert not ON_CUDA.materialises_attention(grouped.model, is_16bit=True)
    older = Traits(on_cuda=True, has_bf16=False, has_flash=False)
    assert older.materialises_attention(grouped.model, is_16bit=True)
    assert not older.materialises_attention(small_config.model, is_16bit=True)


def card(capability: str, **more: object) -> GpuConfig:
    return GpuConfig(name="card", device=DeviceChoice.cuda, memory_mib=1000, compute_capability=capability, **more)  # type: ignore[arg-type]


def test_what_a_profile_says_of_its_card() -> None:
    assert traits_of(card("7.5")) == Traits(on_cuda=True, has_bf16=False, has_flash=False)
    assert traits_of(card("8.6")) == ON_CUDA
    assert traits_of(GpuConfig(name="cpu", device=DeviceChoice.cpu)) == ON_CPU
    assert workspace_bytes(card("8.0")) == 2 * 8_519_680
    assert workspace_bytes(card("9.0")) == 2 * 32 * MIB
    assert workspace_bytes(GpuConfig(name="cpu", device=DeviceChoice.cpu)) == 0


def test_cards_that_an_fp32_run_cannot_tell_apart_share_it(tiny_config: TrainConfig) -> None:
    older = traits_of(card("7.5"))
    assert relevant_traits(older, tiny_config) == ON_CUDA
    assert relevant_traits(older, with_optim(tiny_config, (False, True, False, False))) == older


def test_bf16_on_a_card_without_it_is_a_row_with_an_error(small_config: TrainConfig) -> None:
    small_config.mp.dtype = DtypeChoice.bf16
    optims = [with_optim(small_config, toggles).optim for toggles in ((False,) * 4, (False, True, False, False))]
    fp32, bf16 = predict(small_config, optims, [card("7.5")], [(20, 5)])
    assert "bf16 is not supported" in bf16["error"]
    assert bf16["peak_memory_mib"] is bf16["fits"] is None
    assert fp32["error"] is None
    assert fp32["fits"]


def test_a_row_adds_the_cards_own_terms(small_config: TrainConfig) -> None:
    small, hopper = card("8.0", context_mib=100), replace(card("9.0"), name="hopper")
    row, other = predict(small_config, [small_config.optim], [small, hopper], [(20, 5)])
    assert sum(row["memory_mib"].values()) == pytest.approx(row["peak_memory_mib"])
    assert sum(item["mb"] for item in row["breakdown"]) == pytest.approx(row["peak_memory_mib"])
    assert row["required_mib"] == row["reserved_mib"] + 100
    assert row["margin_mib"] == 1000 - row["required_mib"]
    assert other["peak_memory_mib"] - row["peak_memory_mib"] == pytest.approx(64 - 16.25)
    assert row["reserved_mib"] >= row["peak_memory_mib"]
    exact = replace(small, memory_mib=int(row["required_mib"]))  # reserved memory is in whole pages
    assert [r["fits"] for r in predict(small_config, [small_config.optim], [exact], [(20, 5)])] == [True]
    less = replace(exact, memory_mib=int(row["required_mib"]) - 1)
    assert [r["fits"] for r in predict(small_config, [small_config.optim], [less], [(20, 5)])] == [False]


# Operators


def test_flops_of_a_step_are_those_of_its_matrix_products(small_config: TrainConfig) -> None:
    """Forward 2 FLOPs a weight and token, backward twice that, but none for the input of the first products."""
    model, n_tokens, n_targets = small_config.model, 32, 7
    (costs,) = run_costs([small_config], [Sample([1] * (n_tokens + 1), n_tokens + 1 - n_targets)], ON_CUDA)
    per_layer = 4 * model.dim**2 + 3 * model.dim * model.ffn_dim
    weights_ = 6 * (per_layer * model.n_layers * n_tokens + model.dim * model.vocab_size * n_targets)
    # One product of S (S + 1) / 2 causal scores, all heads; there are 2 in forward and 5 in backward.
    scores = n_tokens * (n_tokens + 1) * model.dim
    assert flops_of(costs.operators) == {"float32": pytest.approx(weights_ + 7 * scores * model.n_layers)}


@pytest.mark.parametrize(
    ("toggles", "n_layers", "every"),
    [((True, False, False, False), 5, 1), ((False, True, True, True), 5, 1), ((False, False, False, True), 6, 2)],
)
def test_costs_of_a_whole_run_are_those_of_its_steps_counted_one_by_one(
    small_config: TrainConfig,
    toggles: tuple[bool, ...],
    n_layers: int,
    every: int,
) -> None:
    config = with_optim(replace(small_config, model=replace(small_config.model, n_layers=n_layers)), toggles)
    config.ga.steps, config.gc.every = 2, every
    samples = [Sample([1] * 33, 33 - 8)] * 6  # of one shape: nothing is interpolated
    found = run_costs([config], samples, ON_CUDA)[0]
    real = [collate([sample], padding_of(config, ON_CUDA)) for sample in samples[: 2 if config.optim.ga else 1]]
    with fake_step(config, ON_CUDA) as step:
        window = [as_fake(batch) for batch in real]
        step(window)
        counter = OperatorCounter()
        with counter:
            step(window)
    n_steps = 3 if config.optim.ga else 6
    assert found.steps == n_steps
    for dtype, flops in flops_of(counter.operators).items():
        assert flops_of(found.operators)[dtype] == pytest.approx(flops * n_steps)
    assert bytes_of(found.operators) == pytest.approx(bytes_of(counter.operators) * n_steps, rel=1e-3)


def test_costs_of_ragged_samples_lie_close_to_those_counted_one_by_one(small_config: TrainConfig) -> None:
    samples = ragged_samples()
    found = run_costs([small_config], samples, ON_CUDA)[0]
    batches = [collate([sample]) for sample in samples]
    flops = moved = 0.0
    with fake_step(small_config, ON_CUDA) as step:
        step([as_fake(batches[0])])  # makes the optimizer's state
        for batch in batches:
            counter = OperatorCounter()
            with counter:
                step([as_fake(batch)])
            flops += flops_of(counter.operators)["float32"]
            moved += bytes_of(counter.operators)
    assert flops_of(found.operators)["float32"] == pytest.approx(flops, rel=0.02)  # attention's part is quadratic
    assert bytes_of(found.operators) == pytest.approx(moved, rel=0.02)


def test_bytes_of_an_update_are_those_of_adamw(small_config: TrainConfig) -> None:
    """Fused AdamW reads weight, gradient and two moments and writes all but the gradient: 7 x 4 bytes a weight.

    Clipping reads each gradient once for its norm, and reads and writes it once to scale it: 3 more.
    """
    with fake_step(small_config, ON_CUDA) as step:
        n_weights = sum(p.numel() for p in step.model.parameters())
        give_gradients(step)
        update(step)
        give_gradients(step)
        counter = OperatorCounter()
        with counter:
            update(step)
    assert bytes_of(counter.operators) == pytest.approx(4 * 10 * n_weights, rel=0.005)


def test_nodes_are_values_and_weights_sum_to_their_number() -> None:
    values = [3, 9, 9, 4, 30, 12]
    at = nodes(values)
    assert at == [3, 9, 30]
    found = weights(values, at)
    assert sum(found) == pytest.approx(len(values))
    assert sum(w * x for w, x in zip(found, at, strict=True)) == pytest.approx(sum(values))  # exact for what is linear
    assert weights([5, 5], nodes([5, 5])) == [2]


def test_the_bound_takes_the_slower_resource_of_each_operator() -> None:
    gpu = card("8.0", bandwidth_gb_s=100.0, tflops=MatrixRates(fp32=1.0, bf16=2.0))
    operators = {("float32", 2e12, 1e9, 0.0): 3, ("bfloat16", 2e9, 1e9, 0.0): 1, ("", 0.0, 5e10, 0.0): 2}
    spent = by_resource(operators, gpu)  # type: ignore[arg-type]
    assert spent == {"memory": pytest.approx(0.01 + 1.0), "fp32": pytest.approx(6.0)}
    assert by_resource(operators, card("8.0")) is None  # type: ignore[arg-type]
    without = card("8.0", bandwidth_gb_s=100.0, tflops=MatrixRates(fp32=1.0))
    assert by_resource(operators, without) is None  # type: ignore[arg-type]


# The allocator


def test_the_allocator_takes_whole_pages_and_reuses_what_is_free() -> None:
    allocator = Allocator()
    first = allocator.allocate(1)
    assert allocator.reserved == SMALL_PAGE
    big = allocator.allocate(3 * 2**20)
    assert allocator.reserved == SMALL_PAGE + LARGE_PAGE
    allocator.allocate(17 * 2**20)  # the rest of the page
    assert allocator.reserved == SMALL_PAGE + LARGE_PAGE
    allocator.release(big)
    allocator.allocate(2 * 2**20)  # into the hole
    assert allocator.reserved == SMALL_PAGE + LARGE_PAGE
    allocator.allocate(2 * 2**20)  # 1 MiB of the hole is left: another page
    assert allocator.reserved == SMALL_PAGE + 2 * LARGE_PAGE
    allocator.release(first)
    assert allocator.reserved == SMALL_PAGE + 2 * LARGE_PAGE  # nothing is given back


def test_expandable_segments_grow_by_what_is_missing() -> None:
    allocator = Allocator()
    held = allocator.allocate(15 * 2**20)
    allocator.allocate(25 * 2**20)  # 5 MiB are free at the end: one page is enough
    assert allocator.reserved == 2 * LARGE_PAGE
    allocator.release(held)


def test_the_end_that_can_grow_is_taken_last() -> None:
    allocator = Allocator()
    hole = allocator.allocate(12 * 2**20)
    held = allocator.allocate(2 * 2**20)  # 6 MiB are left at the end
    allocator.release(hole)
    _, start, _ = allocator.allocate(4 * 2**20)
    assert start == 0  # the end would have been the better fit
    _, start, _ = allocator.allocate(5 * 2**20)
    assert start == 4 * 2**20
    assert allocator.reserved == LARGE_PAGE
    _, start, _ = allocator.allocate(5 * 2**20)
    assert start == 14 * 2**20  # nothing else is left
    allocator.release(held)


def comings_and_goings(events: list[Event]) -> list[list[int]]:
    """Sizes of storages that come one after the other, or go: those in any order."""
    runs = itertools.groupby(events, key=lambda event: event[1])
    sizes = [(sign, [storage.nbytes for storage, _, _ in run]) for sign, run in runs]
    return [each if sign > 0 else sorted(each) for sign, each in sizes]


@pytest.mark.parametrize("toggles", [t for t in COMBINATIONS if not t[0]], ids=name)
def test_storages_come_and_go_as_in_two_steps_one_after_the_other(small_config, toggles) -> None:
    """With gradient accumulation the micro-batches before the last are left out, which leave nothing but gradients."""
    config = with_optim(small_config, toggles)
    samples = [Sample([1] * 33, 20)] * 3
    planned = fake_run(config, samples, ON_CUDA).events
    (window,) = hardest_windows(samples, config.training.micro_batch_size, 1, padding_of(config, ON_CUDA))
    with fake_step(config, ON_CUDA) as step:
        batches = [as_fake(batch) for batch in window]
        tensors = [tensor for batch in batches for tensor in batch.tensors]
        kernel = FlashAttentionMemory() if config.optim.mp else nullcontext()
        with MemoryTracker(step.model, step.optimizer, tensors, ON_CUDA.rounding) as tracker, kernel:
            for _ in range(2):
                step(batches)
    assert comings_and_goings(planned) == comings_and_goings(tracker.events)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50 * 2**20)), max_size=60))
def test_blocks_never_overlap_and_reserved_covers_them(requests: list[tuple[bool, int]]) -> None:
    allocator = Allocator()
    live: list[tuple[object, int, int]] = []
    for release, size in requests:
        if release and live:
            allocator.release(live.pop(size % len(live)))  # type: ignore[arg-type]
        else:
            live.append(allocator.allocate(size))
            assert live[-1][2] == rounded(size) >= size
    for (pool, start, size), (other, begin, length) in itertools.combinations(live, 2):
        assert pool is not other or start + size <= begin or begin + length <= start
    assert allocator.reserved >= sum(size for _, _, size in live)
    assert allocator.reserved % SMALL_PAGE == 0


def test_a_lora_target_that_there_is_not_is_refused(small_config: TrainConfig) -> None:
    small_config.lora.targets = ["wx"]
    with pytest.raises(UserError, match=r"lora\.targets: no linear layer is named wx"):
        fake_run(with_optim(small_config, (False, False, True, False)), ragged_samples(), ON_CPU)


def test_plain_amp_and_16bit_masters_are_the_real_runs(small_config: TrainConfig) -> None:
    samples = ragged_samples()
    for toggles, key, value in (
        ((False, True, True, False), "frozen_weights", WeightStorage.fp32),
        ((False, True, False, False), "trainable_weights", WeightStorage.compute),
    ):
        config = replace(small_config, mp=replace(small_config.mp, **{key: value}))
        assert fake_run(with_optim(config, toggles), samples, ON_CPU).use == measured(config, samples, toggles)


@pytest.mark.parametrize("toggles", [(False, False, False, False), (True, True, True, True)], ids=name)
def test_a_timeline_climbs_to_the_peak_and_ends_with_the_update(
    small_config: TrainConfig,
    toggles: tuple[bool, ...],
) -> None:
    small_config.ga.steps = 2
    run = fake_run(with_optim(small_config, toggles), [Sample([1] * 33, 5)] * 4, ON_CPU)
    points = timeline(run.events, run.last_step)
    totals = [sum(point.memory_mib.values()) for point in points]
    assert max(totals) == pytest.approx(run.use.peak_mib)
    assert list(dict.fromkeys(point.phase for point in points)) == ["forward", "backward", "optimizer step"]
    last = points[-1].memory_mib
    assert last["gradient"] == pytest.approx(last["optimizer_state"] / 2, abs=1e-2)  # fp32, and two moments
    assert (points[0].memory_mib["gradient"] > 0) == toggles[0]  # accumulated before


def test_an_interrupt_does_not_wait_for_what_runs() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def wait_for_both() -> None:
        with processes(2) as run:
            signal.setitimer(signal.ITIMER_REAL, 3)
            list(run(time.sleep, dict.fromkeys(range(2), (120,))))

    earlier = signal.signal(signal.SIGALRM, interrupt)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_for_both()
    finally:
        signal.signal(signal.SIGALRM, earlier)
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []
