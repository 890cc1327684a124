"""Finds the most memory that a run can need, in any order of its samples, by a dry run before the first step."""

from collections import Counter
from collections.abc import Sequence
from heapq import heappush, heappushpop, nlargest
from itertools import accumulate

import torch

from llama_ft.data.collate import Batch, Padding, blank_row, collate, end_to_end
from llama_ft.data.records import Sample, Samples
from llama_ft.measure.memory import MemoryTracker, MemoryUse
from llama_ft.system import Log, Pace, silent
from llama_ft.training.loop import Windows
from llama_ft.training.step import TrainStep, Window, evaluate_batch


def measure_worst_case(step: TrainStep, data: Windows, log: Log = silent) -> MemoryUse:
    """Memory by category at the peak of a run over this data. Leaves weights and random state unchanged."""
    return track_memory(step, hardest_windows(data), log, hardest_evaluations(data))


def warm_up(step: TrainStep, data: Windows) -> None:
    """Load kernels and compile layers before the first step; weights and random state stay unchanged.

    On CUDA the allocator's own peak statistics start here, where no tracker runs: a tracker would hold each operator's
    inputs and outputs until the operator has returned.
    """
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(step.device)
    by_length = sorted(data.samples, key=len)
    usual = [[data.lay_out([sample])] for sample in (by_length[len(by_length) // 2], by_length[0])]
    for window in [*hardest_windows(data), *usual]:  # other widths use other kernels, loaded on first use
        step.dry_run(window)
    for batch in hardest_evaluations(data):
        evaluate_batch(step, batch)


def track_memory(
    step: TrainStep, hardest: list[Window], log: Log = silent, evaluated: Sequence[Batch] = ()
) -> MemoryUse:
    """Dry-run windows under the tracker: the first without optimizer state, then all with it; then evaluate."""
    tensors = [tensor for window in hardest for batch in window for tensor in batch.tensors]
    with MemoryTracker(step.model, step.optimizer, tensors) as tracker:
        windows, pace = [hardest[0], *hardest], Pace()
        for number, window in enumerate(windows, 1):
            step.dry_run(window)
            if pace.is_due():
                log(f"dry run: {number} of {len(windows)} optimizer steps")
        for batch in evaluated:
            tracker.watch(batch.tensors)
            evaluate_batch(step, batch)
    return tracker.result()


def hardest_windows(data: Windows) -> list[Window]:
    """Candidates for the worst case, widest first: no shuffle of the data needs more memory than the worst of them.

    The hard micro-batch comes last, when gradients have already been accumulated; those before it are short, for speed.
    """
    by_length, most = sorted(data.samples, key=len), data.most_samples
    if data.packing is not None:
        needs_several = sum(len(sample) - 1 for sample in by_length[-most:]) > data.packing
        before = [data.lay_out(by_length[:1])] if needs_several and most > 1 else []
        return [[*before, row] for row in hardest_rows(by_length, most, data.packing, data.padding)]
    size = min(data.micro_batch_size, most)
    before = [data.lay_out(group) for group in data.groups(by_length[:most])[:-1]]
    return [[*before, collate(group, data.padding)] for group in hardest_groups(by_length, size, data.padding)]


def hardest_evaluations(data: Windows) -> list[Batch]:
    """Candidates for the held-out batch that needs the most memory: no other is both larger and has more targets."""
    by_size = {(batch.tokens.numel(), batch.n_targets): batch for batch in data.held_out_batches()}
    return [by_size[corner] for corner in hull(list(by_size))]


def hardest_rows(by_length: list[Sample], window_size: int, max_tokens: int, padding: Padding) -> list[Batch]:
    """Candidates for the packed row that needs the most memory.

    At each instant of a step memory is linear in a row's tokens, targets and sequences. So a row with the largest
    number of each that any row has needs at least as much as any row, even if no row has all three. Rows of a single
    sample longer than `max_tokens` are candidates too.
    """
    lone = [sample for sample in by_length if len(sample) - 1 > max_tokens]
    rows = [end_to_end(group, padding) for group in hardest_groups(lone, 1, padding)]
    if packed := by_length[: len(by_length) - len(lone)]:
        widths = [len(sample) - 1 for sample in packed]
        n_tokens = most_tokens(widths, window_size, max_tokens)
        n_sequences = sum(together <= n_tokens for together in accumulate(widths[:window_size]))
        n_targets = most_targets(packed, window_size, n_tokens)
        n_tokens += padding.added(n_tokens, n_tokens - (n_sequences - 1) * (padding.max_width or 0))
        share, more = divmod(n_tokens, n_sequences)
        rows.append(blank_row([share + (index < more) for index in range(n_sequences)], n_targets))
    return rows


def most_tokens(widths: Sequence[int], n_samples: int, max_tokens: int) -> int:
    """The most tokens, up to `max_tokens`, that at most `n_samples` of the samples have together."""
    if (together := sum(nlargest(n_samples, widths))) <= max_tokens:
        return together
    # Bit t of the n-th number is set if n of the samples so far can have t tokens together.
    sums, within = [1] + [0] * min(n_samples, len(widths)), (2 << max_tokens) - 1
    for width, count in Counter(widths).items():
        for _ in range(min(count, n_samples)):
            for n in reversed(range(1, len(sums))):
                sums[n] |= sums[n - 1] << width & within
        if any(each >> max_tokens for each in sums):
            break
    return max(each.bit_length() for each in sums) - 1


def most_targets(samples: Samples, n_samples: int, n_tokens: int) -> int:
    """An upper bound on the targets of `n_samples` samples with `n_tokens` tokens together.

    It is the smaller of two bounds: the samples with the largest share of targets, the last one cut (the fractional
    knapsack, Dantzig 1957), and the samples with the most targets.
    """
    room, n_targets = n_tokens, 0
    for sample in sorted(samples, key=lambda each: each.n_targets / (len(each) - 1), reverse=True):
        width = min(len(sample) - 1, room)
        n_targets -= -sample.n_targets * width // (len(sample) - 1)  # rounded up
        room -= width
    return min(n_targets, sum(nlargest(n_samples, (sample.n_targets for sample in samples))))


def hardest_groups(by_length: list[Sample], micro_batch_size: int, padding: Padding) -> list[list[Sample]]:
    """Candidates for the micro-batch that needs the most memory, widest first; `by_length` is shortest first.

    A micro-batch's size is set by its padded width and, since logits are computed only for targets, its number of
    targets. At each instant of a step memory is a convex function of the two, up to rounding: linear, but quadratic in
    the width where all attention scores are kept. So memory is largest at a corner of the convex hull of all pairs that
    can occur, and no other micro-batch has to be tried.
    """
    size = min(micro_batch_size, len(by_length))
    best: dict[int, tuple[int, int]] = {}  # by width: the most targets, and the index of the longest sample
    others: list[int] = []  # a heap of the size - 1 largest numbers of targets so far
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
            continue  # another point has at least as much of both
        while len(corners) > 1:
            (right, low), (middle, high) = corners[-2:]
            if (middle - right) * (y - low) > (high - low) * (x - right):
                break  # the last corner is beyond the line between its neighbors
            corners.pop()
        corners.append((x, y))
    return corners
