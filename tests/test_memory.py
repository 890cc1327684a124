"""The memory tracker against closed forms, on layers whose every byte can be counted by hand."""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.training import COMBINATIONS, make_step, name, ragged_samples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llama_ft.config import OptimConfig, Optimizer
from llama_ft.data.collate import Padding, collate
from llama_ft.data.records import Sample
from llama_ft.measure.memory import MemoryTracker
from llama_ft.measure.worst_case import hardest_groups, hardest_windows, track_memory
from llama_ft.records import CATEGORIES
from llama_ft.system import Pace
from llama_ft.training.loop import Windows

KB = 1024 / 2**20  # in MiB


class TwoLinears(nn.Module):
    """1024 features twice: 4 MiB of fp32 weights each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def track(model: nn.Module, steps: int = 2, micro_batches: int = 1, autocast: bool = False):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.ones(256, 1024)
    with MemoryTracker(model, optimizer, [x]) as tracker:
        for _ in range(steps):
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(x).sum()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return tracker.result()


def test_each_category_is_what_the_arithmetic_says() -> None:
    use = track(TwoLinears())
    assert use.max_mib["parameter"] == 8
    assert use.max_mib["gradient"] == 8
    assert use.max_mib["optimizer_state"] == pytest.approx(16, abs=1 * KB)  # two moments, and step counts of 4 bytes
    assert use.max_mib["other"] == 1  # the batch
    # Kept by forward: the outputs of first, of relu and of second, each 1 MiB; linear and relu add no temporaries.
    assert use.max_mib["activation"] == pytest.approx(3, abs=4 * KB)


def test_the_peak_is_that_of_the_second_step_and_is_named() -> None:
    model = TwoLinears()
    first, both = track(model, steps=1), track(TwoLinears(), steps=2)
    assert first.phase == "optimizer step"
    assert first.peak_mib == pytest.approx(8 + 8 + 16 + 1, abs=4 * KB)
    assert both.phase == "backward"  # optimizer state, all gradients, and what backward still holds
    assert both.peak_mib > first.peak_mib


def test_accumulation_keeps_gradients_over_the_micro_batches() -> None:
    one, two = track(TwoLinears()), track(TwoLinears(), micro_batches=2)
    assert two.max_mib["gradient"] == pytest.approx(one.max_mib["gradient"] + 4)  # a new one beside the sum
    assert two.max_mib["activation"] == pytest.approx(one.max_mib["activation"], abs=1 * KB)


def test_autocast_copies_of_weights_count_as_parameters() -> None:
    use = track(TwoLinears(), autocast=True)
    assert use.max_mib["parameter"] == 8 + 4  # fp32 masters and bf16 copies
    assert use.max_mib["gradient"] == 8  # fp32
    assert {item.dtype for item in use.breakdown if item.category == "parameter"} <= {"float32", "bfloat16"}


def test_views_and_in_place_operators_allocate_nothing() -> None:
    model = nn.Linear(8, 8, bias=False)
    with MemoryTracker(model, torch.optim.SGD(model.parameters(), lr=0.1)) as tracker:
        x = torch.ones(1024, 256)
        x.view(256, 1024).add_(1).t().relu_()
        del x
        torch.ones(1024, 128)
    use = tracker.result()
    assert use.max_mib["activation"] == 1
    assert use.peak_mib == pytest.approx(1, abs=1 * KB)


@pytest.mark.parametrize("optim", COMBINATIONS, ids=name)
def test_on_tiny_categories_sum_to_the_peak(tiny_config, optim) -> None:
    step, n = make_step(tiny_config, optim), tiny_config.accumulation_steps
    window = [collate([sample], Padding(step.precision.pad_multiple)) for sample in ragged_samples()][:n]
    with MemoryTracker(step.model, step.optimizer) as tracker:
        step.dry_run(window)
        step.dry_run(window)
    use = tracker.result()
    assert tuple(use.at_peak_mib) == CATEGORIES
    assert sum(use.at_peak_mib.values()) == pytest.approx(use.peak_mib)
    assert sum(item.mib for item in use.breakdown) == pytest.approx(use.peak_mib)
    assert use.at_peak_mib["other"] <= 0.05 * use.peak_mib
    assert all(use.at_peak_mib[c] <= use.max_mib[c] + 1e-9 for c in CATEGORIES)
    trainable = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    assert use.max_mib["optimizer_state"] == pytest.approx(8 * trainable / 2**20, rel=1e-2)
    stored = sum(p.numel() * p.element_size() for p in step.model.parameters()) / 2**20
    assert use.max_mib["parameter"] >= stored


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(mp=True, lora=True, neft=True)], ids=name)
@pytest.mark.parametrize(("momentum", "copies"), [(0.0, 0), (0.9, 1)])
def test_sgd_keeps_a_copy_of_what_is_trained_or_nothing(tiny_config, optim, momentum: float, copies: int) -> None:
    tiny_config.training.optimizer, tiny_config.training.momentum = Optimizer.sgd, momentum
    step = make_step(tiny_config, optim)
    use = track_memory(step, [[collate(ragged_samples(), Padding(step.precision.pad_multiple))]])
    trainable = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    assert use.max_mib["optimizer_state"] == copies * 4 * trainable / 2**20
    assert use.at_peak_mib["other"] <= 0.05 * use.peak_mib


def test_lora_and_checkpointing_save_what_they_are_for(tiny_config) -> None:
    uses = {}
    for lora, gc in itertools.product([False, True], repeat=2):
        optim = OptimConfig(lora=lora, gc=gc)
        step = make_step(tiny_config, optim)
        with MemoryTracker(step.model, step.optimizer) as tracker:
            step.dry_run([collate(ragged_samples())])
        uses[optim.combination] = tracker.result().max_mib
    for category in ("gradient", "optimizer_state"):
        assert uses["lora"][category] < 0.1 * uses["baseline"][category]
    assert uses["gc"]["activation"] < 0.6 * uses["baseline"]["activation"]
    assert uses["lora_gc"]["activation"] < 0.6 * uses["lora"]["activation"]


def test_tracking_changes_no_result(tiny_config) -> None:
    losses = []
    for tracked in (False, True):
        step = make_step(tiny_config, OptimConfig(ga=True, lora=True, gc=True))
        window = [collate(ragged_samples())]
        with MemoryTracker(step.model, step.optimizer) if tracked else nullcontext():
            losses.append([step(window)[0].item() for _ in range(3)])
    assert losses[0] == losses[1]


def hardest(samples: list[Sample], n: int, micro_batch_size: int = 1, **others: Any):
    return hardest_windows(Windows(samples, micro_batch_size, n, **others))


@pytest.mark.parametrize("n", [1, 3])
def test_no_order_of_the_data_needs_more_than_the_hardest_windows(tiny_config, n: int) -> None:
    samples = ragged_samples()
    orders = [samples, samples[::-1], sorted(samples, key=len), sorted(samples, key=len, reverse=True)]
    peaks = []
    for windows in [hardest(samples, n)] + [[[collate([s]) for s in order[:n]]] for order in orders]:
        step = make_step(tiny_config, OptimConfig(ga=True))
        peaks.append(track_memory(step, windows).peak_mib)
    assert peaks[0] == pytest.approx(max(peaks), abs=1 * KB)  # the batches' own tensors
    assert peaks[0] > min(peaks)


def test_a_long_dry_run_says_how_far_it_is(tiny_config, monkeypatch) -> None:
    monkeypatch.setattr(Pace, "SECONDS", 0)
    lines: list[str] = []
    track_memory(make_step(tiny_config, OptimConfig(lora=True)), [[collate(ragged_samples()[:1])]], lines.append)
    assert lines == ["dry run: 1 of 2 optimizer steps", "dry run: 2 of 2 optimizer steps"]


def test_neither_longest_nor_most_targets_can_be_hardest(tiny_config) -> None:
    samples = [Sample.after([5] * length, length - n) for length, n in [(120, 4), (9, 5), (114, 90), (96, 94)]]
    peaks = []
    for sample in samples:
        step = make_step(tiny_config, OptimConfig(lora=True))
        peaks.append(track_memory(step, [[collate([sample])]]).peak_mib)
    assert peaks[2] == max(peaks) > max(peaks[0], peaks[3])
    assert track_memory(step, hardest(samples, 1)).peak_mib >= max(peaks)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=9),
    st.integers(1, 4),
    st.sampled_from([1, 8]),
    st.tuples(*[st.integers(0, 50)] * 3),
)
def test_hardest_micro_batches_are_hard_by_any_convex_measure(lengths, micro_batch_size, multiple, factors):
    samples = [Sample.after([5] * (n_prompt + n), n_prompt) for n_prompt, n in lengths]

    def hardness(group: Sequence[Sample]) -> int:
        batch = collate(group, Padding(multiple))
        width = batch.tokens.shape[1]
        return factors[0] * width + factors[1] * batch.n_targets + factors[2] * width**2

    found = hardest_groups(sorted(samples, key=len), micro_batch_size, Padding(multiple))
    size = min(micro_batch_size, len(samples))
    assert all(len({id(sample) for sample in group}) == size for group in found)
    assert max(map(hardness, found)) == max(hardness(group) for group in itertools.combinations(samples, size))


def test_hardest_windows_are_full_where_there_are_samples_enough() -> None:
    samples = ragged_samples()
    assert {len(window) for window in hardest(samples, 4)} == {4}
    assert {len(window) for window in hardest(samples[:2], 8)} == {2}
    assert {window[-1].tokens.shape[0] for window in hardest(samples, 2, micro_batch_size=3)} == {3}
    assert hardest(samples, 4)[0][-1].tokens.shape[1] == max(len(sample) for sample in samples) - 1
