"""The most memory that a run can need, whatever order its samples come in: found by a dry run before the first step."""

from collections.abc import Sequence
from heapq import heappush, heappushpop, nlargest

import torch

from llama_ft.data.collate import Padding, collate
from llama_ft.data.dataset import Log, Sample, silent
from llama_ft.measure.memory import MemoryTracker, MemoryUse
from llama_ft.system import Pace
from llama_ft.training.loop import Windows
from llama_ft.training.step import TrainStep, Window


def measure_worst_case(step: TrainStep, data: Windows, log: Log = silent) -> MemoryUse:
    """Memory by category at the peak of a run over this data. Weights and random state are as before afterwards.

    On CUDA the allocator's own peak statistics start here, with a pass that is not tracked: the tracker holds each
    operator's inputs and outputs until it has returned.
    """
    hardest = hardest_windows(data.samples, data.micro_batch_size, data.accumulation_steps, data.padding)
    use = track_memory(step, hardest, log)
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(step.device)
        by_length = sorted(data.samples, key=len)
        usual = [[collate([sample], data.padding)] for sample in (by_length[len(by_length) // 2], by_length[0])]
        for window in [*hardest, *usual]:  # other widths have other kernels, which are loaded when first used
            step.dry_run(window)
    return use


def track_memory(step: TrainStep, hardest: list[Window], log: Log = silent) -> MemoryUse:
    """Dry-run windows under the tracker: the first without optimizer state, then all of them with it."""
    tensors = [tensor for window in hardest for batch in window for tensor in batch.tensors]
    with MemoryTracker(step.model, step.optimizer, tensors) as tracker:
        windows, pace = [hardest[0], *hardest], Pace()
        for number, window in enumerate(windows, 1):
            step.dry_run(window)
            if pace.is_due():
                log(f"dry run: {number} of {len(windows)} optimizer steps")
    return tracker.result()


def hardest_windows(
    samples: Sequence[Sample], micro_batch_size: int, accumulation_steps: int, padding: Padding
) -> list[Window]:
    """Candidates for the worst case: no shuffle of the data needs more memory than the worst of these. Widest first.

    The hard micro-batch comes last, when gradients have already been accumulated; what comes before it is short, to be
    quick.
    """
    by_length = sorted(samples, key=len)
    n_before = min(accumulation_steps, -(-len(samples) // micro_batch_size)) - 1
    starts = range(0, n_before * micro_batch_size, micro_batch_size)
    before = [collate(by_length[start : start + micro_batch_size], padding) for start in starts]
    return [[*before, collate(group, padding)] for group in hardest_groups(by_length, micro_batch_size, padding)]


def hardest_groups(by_length: list[Sample], micro_batch_size: int, padding: Padding) -> list[list[Sample]]:
    """Candidates, out of all samples, shortest first, for the micro-batch that needs the most memory; widest first.

    A micro-batch is as large as its padded width and, since logits are computed for targets alone, its number of
    targets make it. At each instant of a step memory is a convex function of the two, at least to a rounding: linear,
    but quadratic in the width where attention's whole square is kept. So what is alive at once is most at a corner of
    the convex hull of all pairs that can occur, and no other micro-batch has to be tried.
    """
    size = min(micro_batch_size, len(by_length))
    best: dict[int, tuple[int, int]] = {}  # by width: most targets, and which sample is then the longest one
    others: list[int] = []  # a heap: the most targets that size - 1 of the samples so far have
    for index, sample in enumerate(by_length):
        if index >= size - 1:
            width = padding.width(len(sample) - 1)
            best[width] = max(best.get(width, (0, 0)), (sample.n_targets + sum(others), index))
        if len(others) < size - 1:
            heappush(others, sample.n_targets)
        elif others:
            heappushpop(others, sample.n_targets)
    corners = hull([(width, n_targets) for width, (n_targets, _) in best.items()])
    longest = [best[width][1] for width, _ in corners]
    return [[by_length[i], *nlargest(size - 1, by_length[:i], key=lambda each: each.n_targets)] for i in longest]


def hull(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The upper right corners of the points' convex hull, from the right (Andrew's monotone chain, 1979)."""
    corners: list[tuple[int, int]] = []
    for x, y in sorted(points, reverse=True):
        if corners and y <= corners[-1][1]:
            continue  # another point has as much of both
        while len(corners) > 1:
            (right, low), (middle, high) = corners[-2:]
            if (middle - right) * (y - low) > (high - low) * (x - right):
                break  # the last corner lies beyond the line between its neighbours
            corners.pop()
        corners.append((x, y))
    return corners
