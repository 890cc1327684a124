"""Packing: the samples of an optimizer step laid end to end, against the same step without it."""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import relative, small_model
from helpers.planning import ON_CPU, ON_CUDA, small_config
from helpers.training import COMBINATIONS, gradients, make_step, name, ragged_samples, step_in
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ft.config import OptimConfig, TrainConfig, TrainingConfig
from llama_ft.data.collate import Batch, Padding, collate, end_to_end, rows_of
from llama_ft.data.records import Sample
from llama_ft.measure.worst_case import (
    hardest_windows,
    measure_worst_case,
    most_targets,
    most_tokens,
    track_memory,
)
from llama_ft.model import attention
from llama_ft.model.attention import Segments, attend, has_varlen, takes_segments, varlen_attention
from llama_ft.planning import predict
from llama_ft.planning.fake_run import as_fake, fake_run, fake_step, windows_of
from llama_ft.planning.operators import OperatorCounter, bytes_of, flops_of
from llama_ft.planning.run_costs import run_costs
from llama_ft.training.loop import Windows
from llama_ft.training.step import Window

needs_varlen = pytest.mark.skipif(not has_varlen(16), reason="this PyTorch has no variable-length attention")
SAMPLES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=9).map(
    lambda lengths: [Sample.after(list(range(1, p + n + 1)), p) for p, n in lengths]
)


# Laying out


@given(SAMPLES, st.integers(1, 60), st.sampled_from([1, 8]), st.sampled_from([None, 24, 30]))
def test_samples_are_laid_out_in_order_as_many_in_a_row_as_fit(samples, max_tokens, multiple, context) -> None:
    batches = [end_to_end(row, Padding(multiple, context)) for row in rows_of(samples, max_tokens)]
    remaining = iter(samples)
    for batch, following in itertools.zip_longest(batches, batches[1:]):
        row = [next(remaining) for _ in batch.segments.lengths]
        widths = [len(sample) - 1 for sample in row]
        assert sum(widths) <= max_tokens or len(row) == 1
        assert following is None or sum(widths) + following.segments.lengths[0] > max_tokens
        padding = batch.tokens.shape[1] - sum(widths)
        assert list(batch.segments.lengths) == [*widths[:-1], widths[-1] + padding]
        assert batch.segments.offsets.tolist() == [0, *itertools.accumulate(batch.segments.lengths)]
        assert 0 <= padding < multiple
        assert context is None or max(batch.segments.lengths) <= context
        # Each sample with the targets that it has by itself.
        expected = [collate([sample]) for sample in row]
        assert batch.tokens[0, : sum(widths)].tolist() == [t for each in expected for t in each.tokens[0].tolist()]
        assert batch.targets.tolist() == [t for each in expected for t in each.targets.tolist()]
        starts = batch.segments.offsets.tolist()
        shifted = [start + p for start, each in zip(starts, expected, strict=False) for p in each.target_positions]
        assert batch.target_positions.tolist() == shifted
        assert batch.n_tokens == sum(len(sample) for sample in row)
    assert next(remaining, None) is None


@pytest.mark.parametrize("size", [1, 3])
def test_windows_have_the_samples_that_they_have_without_packing(size: int) -> None:
    plain = Windows(ragged_samples(), size, 2, seed=3)
    packed = replace(plain, packing=50)

    def targets(windows: Windows, first: int) -> list[list[int]]:
        return [[t for batch in window for t in batch.targets.tolist()] for window in windows.epoch(1, first)]

    for first in (0, 1):  # a resumed epoch begins at its window
        assert targets(packed, first) == targets(plain, first)
    assert len(targets(packed, 0)) == packed.steps_per_epoch == plain.steps_per_epoch


# The same step


@pytest.mark.parametrize("optim", COMBINATIONS, ids=name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_gradients_are_those_without_packing(optim: OptimConfig, dtype: torch.dtype, tolerance: float) -> None:
    """With MP in fp64, where autocast leaves everything as it is; in 16 bit they differ by its rounding."""
    config = small_config()
    config.model = replace(config.model, n_kv_heads=2, qkv_bias=True, qk_norm=True)
    if dtype == torch.float32 and optim.mp:
        tolerance = 0.05
    step = step_in(config, optim, dtype)
    padding = Padding(step.precision.pad_multiple, config.model.max_seq_len)
    plain = Windows(ragged_samples(), 8 // config.accumulation_steps, config.accumulation_steps, padding=padding)
    (window,) = plain.epoch(0)
    expected = gradients(step, window)
    for packing, n_rows in ((1, 8), (70, 3), (1000, 1)):
        (packed,) = replace(plain, packing=packing).epoch(0)
        assert len(packed) == n_rows
        assert max(map(relative, gradients(step, packed), expected)) <= tolerance


def test_a_sample_that_sees_the_one_before_it_would_fail() -> None:
    step = step_in(small_config(), OptimConfig(), torch.float64)
    row = end_to_end(ragged_samples())
    expected, (whole,) = gradients(step, [row]), [row.tokens.shape[1]]
    in_one = replace(row, segments=Segments.of([whole]))
    assert max(map(relative, gradients(step, [in_one]), expected)) > 1e-2


def test_logits_are_those_of_each_sequence_by_itself() -> None:
    model, samples = small_model(2), ragged_samples()
    row = end_to_end(samples)
    with torch.no_grad():
        parts = model(row.tokens, mask=row.segments)[0].split(row.segments.lengths)
        for sample, logits in zip(samples, parts, strict=True):
            assert relative(logits, model(torch.tensor([sample.tokens[:-1]]))[0]) <= 1e-5


def test_a_row_may_be_longer_than_the_context_and_a_sequence_may_not() -> None:
    model = small_model()
    context = model.config.max_seq_len
    tokens = torch.ones(1, context + 5, dtype=torch.int64)
    model(tokens, mask=Segments.of([5, context]))
    with pytest.raises(ValueError, match=f"{context + 1} tokens exceed the model's context of {context}"):
        model(tokens, mask=Segments.of([4, context + 1]))


# Attention


def attention_inputs(n_kv_heads: int, lengths: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), heads, 16) for heads in (4, n_kv_heads, n_kv_heads)]
    made = [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_segments_attend_as_under_a_mask(n_kv_heads: int) -> None:
    lengths = [5, 1, 9, 2]
    inputs, of = attention_inputs(n_kv_heads, lengths), torch.repeat_interleave(torch.tensor(lengths))
    mask = (of[:, None] == of) & torch.ones(17, 17, dtype=torch.bool).tril()
    found = with_gradients(attend(*inputs, Segments.of(lengths)), inputs)
    expected = with_gradients(attend(*inputs, mask), inputs)
    assert all(relative(a, b) <= 1e-12 for a, b in zip(found, expected, strict=True))
    assert found[0].is_contiguous()  # [B, S, H, E]: the projection behind it copies nothing


def dense_varlen(calls: list[Any]) -> Callable[..., Tensor]:
    """PyTorch's variable-length attention by its documentation, computed sequence by sequence."""

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        calls.append((q, k, v, cu_seq_q, cu_seq_k, max_q, max_k))
        out = torch.empty_like(q)
        for start, end in itertools.pairwise(cu_seq_q.tolist()):
            rows = [t[start:end].transpose(0, 1)[None] for t in (q, k, v)]
            kwargs = {"is_causal": True, "enable_gqa": True}
            out[start:end] = torch.nn.functional.scaled_dot_product_attention(*rows, **kwargs)[0].transpose(0, 1)
        return out

    return varlen_attn


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_one_call_gets_what_its_documentation_asks_for(n_kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, calls = [5, 1, 9, 2], []
    monkeypatch.setattr(attention, "varlen_attention", lambda: dense_varlen(calls))
    inputs = attention_inputs(n_kv_heads, lengths)
    found = with_gradients(attend(*inputs, Segments.of(lengths), in_one_call=True), inputs)
    expected = with_gradients(attend(*inputs, Segments.of(lengths)), inputs)
    assert all(relative(a, b) <= 1e-12 for a, b in zip(found, expected, strict=True))
    ((q, k, v, q_offsets, k_offsets, *longest),) = calls
    assert [q.shape, k.shape, v.shape] == [(17, 4, 16), (17, n_kv_heads, 16), (17, n_kv_heads, 16)]
    assert all(tensor.is_contiguous() for tensor in (q, k, v))
    assert q_offsets is k_offsets
    assert (q_offsets.dtype, q_offsets.tolist(), longest) == (torch.int32, [0, 5, 6, 15, 17], [9, 9])


def test_a_model_makes_one_call_a_layer_where_the_kernel_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(attention, "varlen_attention", lambda: dense_varlen(calls))
    model, row = small_model(2), end_to_end(ragged_samples())
    with torch.no_grad():
        expected = model(row.tokens, mask=row.segments)
        for layer in model.layers:
            layer.attention.takes_segments = lambda q: True
        assert relative(model(row.tokens, mask=row.segments), expected) <= 1e-5
    assert len(calls) == len(model.layers)
    assert all(call[3] is row.segments.offsets for call in calls)  # made once, not in each layer


@needs_varlen
def test_this_pytorch_is_asked_for_causal_attention_with_shared_keys() -> None:
    found = varlen_attention()
    assert found.func is torch.nn.attention.varlen.varlen_attn
    assert found.keywords.get("is_causal") or found.keywords["window_size"] == (-1, 0)
    assert not has_varlen(12)
    assert not takes_segments(torch.empty(1, 2, 3, 16, dtype=torch.bfloat16))  # on the CPU


# The dry run


@given(SAMPLES, st.integers(1, 5), st.integers(1, 60))
def test_most_tokens_and_targets_are_those_of_some_and_of_all_choices(samples, size, max_tokens) -> None:
    widths = [len(sample) - 1 for sample in samples]
    choices = [c for n in range(1, size + 1) for c in itertools.combinations(samples, n)]
    fitting = [c for c in choices if sum(len(s) - 1 for s in c) <= max_tokens]
    assert most_tokens(widths, size, max_tokens) == max((sum(len(s) - 1 for s in c) for c in fitting), default=0)
    most = max((sum(s.n_targets for s in c) for c in fitting), default=0)
    assert most <= most_targets(samples, size, max_tokens) <= max_tokens


@settings(max_examples=60)
@given(
    SAMPLES,
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 60),
    st.sampled_from([1, 8]),
    st.tuples(*[st.integers(0, 50)] * 3),
    st.randoms(),
)
def test_hardest_rows_are_hard_by_any_linear_measure(samples, size, steps, packing, multiple, factors, rng) -> None:
    context = max(len(sample) for sample in samples)
    data = Windows(samples, size, steps, 0, Padding(multiple, context), packing)

    def hardness(row: Batch) -> int:
        sizes = row.tokens.shape[1], row.n_targets, len(row.segments.lengths)
        return sum(factor * n for factor, n in zip(factors, sizes, strict=True))

    hardest = hardest_windows(data)
    assert all(max(window[-1].segments.lengths) <= context for window in hardest)
    for _ in range(10):
        rng.shuffle(samples)
        for window in replace(data, samples=samples).epoch(0):
            # Where a row can have others of its window before it, so have the hardest ones.
            reached = [hardness(hard[-1]) for hard in hardest if len(hard) > 1 or len(window) == 1]
            assert max(map(hardness, window)) <= max(reached)


FEW = [OptimConfig(), OptimConfig(ga=True, lora=True), OptimConfig(mp=True, gc=True)]


@pytest.mark.parametrize("optim", FEW, ids=name)
def test_no_order_of_the_data_needs_more_than_the_dry_run_says(optim: OptimConfig) -> None:
    config, samples = small_config(), ragged_samples()
    config.ga.steps, config.training.packing = 2, 60
    step, rng, peaks = make_step(config, optim), random.Random(0), []
    training = TrainingConfig(micro_batch_size=4 // config.accumulation_steps, packing=60)
    data = Windows.over(samples, step, training, config.accumulation_steps)
    use = measure_worst_case(step, data)
    for _ in range(12):
        rng.shuffle(samples)
        # The batches' own tensors are left out: a dry run holds all of its windows at once.
        windows = list(replace(data, samples=samples).epoch(0))
        tracked = track_memory(step, windows)
        peaks.append(tracked.peak_mib - tracked.at_peak_mib["other"])
    assert 0.9 * (use.peak_mib - use.at_peak_mib["other"]) <= max(peaks) <= use.peak_mib - use.at_peak_mib["other"]


# Plans


@pytest.mark.parametrize("optim", COMBINATIONS, ids=name)
@pytest.mark.parametrize("packing", [20, 60, 1000])
def test_a_fake_run_needs_what_the_real_one_needs(optim: OptimConfig, packing: int) -> None:
    config = replace(small_config(), optim=optim)
    config.ga.steps, config.training.packing = 4, packing
    step = make_step(config, optim)
    assert fake_run(config, ragged_samples(), ON_CPU).use == measure_worst_case(
        step, windows_of(config, ragged_samples(), ON_CPU)
    )


def row_operators(config: TrainConfig, windows: list[Window]) -> OperatorCounter:
    counter = OperatorCounter()
    with fake_step(config, ON_CUDA) as step:
        step([as_fake(windows[0][0])])  # makes the optimizer's state
        with counter:
            for window in windows:
                step([as_fake(batch) for batch in window])
    return counter


@pytest.mark.parametrize("mp", [False, pytest.param(True, marks=needs_varlen)])
def test_attention_is_counted_in_each_sequence_and_not_in_the_row(mp: bool) -> None:
    """Forward 2 FLOPs a weight and token, backward twice that; of attention's products 2 and 5 (see test_planning)."""
    config, widths = small_config(mp=mp, ga=True), [39, 29, 24, 20, 16, 11, 8, 7]
    config.training.packing, model = 1000, config.model
    (costs,) = run_costs([config], ragged_samples(), ON_CUDA)
    per_layer, n_targets = 4 * model.dim**2 + 3 * model.dim * model.ffn_dim, sum(s.n_targets for s in ragged_samples())
    of_weights = 6 * (per_layer * model.n_layers * sum(widths) + model.dim * model.vocab_size * n_targets)
    of_scores = 7 * sum(n * (n + 1) for n in widths) * model.dim * model.n_layers
    of_whole = 7 * sum(widths) * (sum(widths) + 1) * model.dim * model.n_layers
    (flops,) = flops_of(costs.operators).values()
    assert flops == pytest.approx(of_weights + of_scores, rel=2e-3)
    assert abs(flops - of_weights - of_scores) < 0.02 * (of_whole - of_scores)
    assert (costs.steps, costs.samples) == (1, 8)


@pytest.mark.parametrize("ga", [False, True])
def test_costs_of_a_run_lie_close_to_those_counted_row_by_row(ga: bool) -> None:
    config = small_config(ga=ga)
    config.ga.steps, config.training.packing, config.training.micro_batch_size = 2, 60, 4
    (costs,) = run_costs([config], ragged_samples(), ON_CUDA)
    windows = list(windows_of(config, ragged_samples(), ON_CUDA).epoch(0))
    counted = row_operators(config, windows).operators
    assert costs.steps == len(windows) == (1 if ga else 2)
    assert flops_of(costs.operators)["float32"] == pytest.approx(flops_of(counted)["float32"], rel=0.02)
    assert bytes_of(costs.operators) == pytest.approx(bytes_of(counted), rel=0.02)


@needs_varlen
def test_on_a_card_a_row_keeps_one_output_and_its_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    config, samples = small_config(mp=True, ga=True), [Sample.after([1] * 73, 5)] * 4
    config.training.packing, config.ga.steps, model = 1000, 4, config.model

    def made() -> Counter[int]:
        run = fake_run(config, samples, ON_CUDA)
        return Counter(each.nbytes for each, sign, _ in run.events[run.last_step :] if sign > 0)

    in_one_call = made()
    monkeypatch.setattr("llama_ft.planning.gpu_traits.has_varlen", lambda head_dim: False)
    one_by_one, sequence = made(), 72 * model.dim * 2
    # Output and three gradients, of each sequence and of the row, whose four are joined where they come one by one.
    assert (in_one_call[sequence], one_by_one[sequence]) == (0, 4 * 4 * model.n_layers)
    assert in_one_call[4 * sequence] == one_by_one[4 * sequence]
    added, per_head = in_one_call - one_by_one, 4 * (288 + 4 * 128)  # 128 rows more for each sequence
    # FlashAttention's fp32 sums, head_dim 16 in blocks of 32; log-sum-exp and the gradient that autograd makes for it.
    assert added[4 * per_head] == added[4 * per_head * 32] == model.n_layers
    assert added[4 * 4 * 288] == 2 * model.n_layers


def test_combinations_share_no_fake_steps_where_their_rows_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = small_config(), small_config()
    packed.training.packing = 100
    for config, shared in ((plain, True), (packed, False)):
        keys = {predict._key(replace(config, optim=OptimConfig(ga=ga)), config.gpu) for ga in (False, True)}
        assert (len(keys) == 1) is shared


def test_a_config_without_packing_has_the_hash_that_it_had() -> None:
    config = small_config()
    assert "packing" not in config.measured()["training"]
    before = config.hash()
    config.training.packing = 100
    assert config.hash() != before


def test_a_model_without_features_has_the_hash_that_it_had() -> None:
    config = small_config()
    assert not {"qkv_bias", "qk_norm"} & config.measured()["model"].keys()
    hashes = {replace(config, model=replace(config.model, **{key: True})).hash() for key in ("qkv_bias", "qk_norm")}
    assert len(hashes | {config.hash()}) == 3
