"""Estimates all operators of a run from a few fake steps.

A step's operators depend on its micro-batches' widths and numbers of targets, and are linear in the number of layers,
or of groups of layers that are checkpointed together. So steps are run at a few widths and numbers of targets, with
one layer or group and with two, and the rest is linear inter- and extrapolation. Packed rows are run with sequences of
one length, chosen so that attention costs as much as for the data's.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from llama_ft.config import TrainConfig
from llama_ft.data.collate import Batch
from llama_ft.data.records import Samples
from llama_ft.planning.fake_run import fake_step, give_gradients, micro_batch, update, windows_of
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.operators import OperatorCounter, Operators, scale, total

N_KNOTS = 3  # widths, and numbers of targets, at which steps are run


@dataclass(frozen=True)
class RunCosts:
    """All operators of a run, and its numbers of steps, samples and tokens."""

    operators: Operators
    steps: int  # optimizer steps
    samples: int
    tokens: int  # of the samples, without padding, as the run counts them


@dataclass(frozen=True)
class StepOperators:
    """The operators of parts of a step."""

    by_width: dict[int, Operators]  # of a micro-batch with one target
    by_targets: dict[int, Operators]  # added to a micro-batch by this many targets instead of one
    accumulated: Operators  # added to a micro-batch whose gradients are accumulated onto another's
    update: Operators  # of the part of a step after the last backward pass


def run_costs(configs: Sequence[TrainConfig], samples: Samples, traits: Traits) -> list[RunCosts]:
    """The operators of whole runs that differ only in techniques that do not change those of a micro-batch."""
    config, training = configs[0], configs[0].training
    data = windows_of(config, samples, traits)
    batches = [batch for window in data.epoch(0) for batch in window]
    # Other epochs' widths and targets differ only if a micro-batch has several samples.
    shapes = [(batch.tokens.shape[1], batch.n_targets) for batch in batches]
    widths, targets = [width for width, _ in shapes], [n_targets for _, n_targets in shapes]
    layers = depths(config)
    n_steps = [windows_of(each, samples, traits).steps_per_epoch for each in configs]
    accumulates = min(n_steps) < len(batches)
    sequence = None if training.packing is None else mean_sequence(batches)
    size = min(training.micro_batch_size, data.most_samples) if sequence is None else 1
    at = knots(widths) if sequence is None else knots_of_sequences(widths, sequence)
    steps = [
        # Targets affect only the head.
        step_operators(config, n, at, knots(targets) if n == min(layers) else [], traits, accumulates, sequence, size)
        for n in layers
    ]
    costs = []
    for n in n_steps:
        parts = [_at_knots(steps[0].by_targets, targets)]
        for step, share in zip(steps, layers.values(), strict=True):
            added = scale(step.accumulated, len(widths) - n)
            epoch = total([_at_knots(step.by_width, widths), added, scale(step.update, n)])
            parts.append(scale(epoch, share))
        n_tokens, epochs = sum(len(sample) for sample in samples), training.epochs
        costs.append(RunCosts(scale(total(parts), epochs), n * epochs, len(samples) * epochs, n_tokens * epochs))
    return costs


def depths(config: TrainConfig) -> dict[int, float]:
    """The numbers of layers to run steps with, and the weight of each in the whole model's operators."""
    n_layers, group = config.model.n_layers, config.gc.every if config.optim.gc else 1
    if n_layers <= 2 * group:
        return {n_layers: 1.0}
    return {group: 2 - n_layers / group, 2 * group: n_layers / group - 1}


def step_operators(
    config: TrainConfig,
    n_layers: int,
    widths: Sequence[int],
    targets: Sequence[int],
    traits: Traits,
    accumulates: bool,
    sequence: int | None,
    size: int,
) -> StepOperators:
    """Run steps of these widths, and of these numbers of targets in a micro-batch.

    `sequence` is the length of packed sequences, None without packing. `size` is the number of rows in a micro-batch.
    """
    config = replace(config, model=replace(config.model, n_layers=n_layers))
    with fake_step(config, traits) as step:

        def count(width: int, n_targets: int = 1, n_micro_batches: int = 1) -> Operators:
            batch = micro_batch(width, n_targets, size, sequence)
            return _counted(lambda: step([batch] * n_micro_batches))

        give_gradients(step)
        update(step)  # creates the optimizer's state
        give_gradients(step)
        after = _counted(lambda: update(step))
        one = {width: count(width) for width in widths}
        per_sample = sorted({min(max(1, round(n / size)), widths[-1]) for n in targets})
        shortest, longest = one[widths[0]], one[widths[-1]]
        accumulated: Operators = Counter()
        if accumulates:  # two micro-batches with one update, minus two of one with an update, plus an update
            accumulated = total([count(widths[0], 1, 2), scale(shortest, -2), after])
        return StepOperators(
            {width: total([operators, scale(after, -1)]) for width, operators in one.items()},
            {n * size: total([count(widths[-1], n), scale(longest, -1)]) for n in per_sample},
            accumulated,
            after,
        )


def _counted(run: Callable[[], object]) -> Operators:
    counter = OperatorCounter()
    with counter:
        run()
    return counter.operators


def knots(values: Sequence[int]) -> list[int]:
    """A few of the values, including the smallest and the largest, with about equally many values between each two."""
    ordered = sorted(values)
    return sorted({ordered[(len(values) - 1) * index // (N_KNOTS - 1)] for index in range(N_KNOTS)})


def mean_sequence(batches: Sequence[Batch]) -> int:
    """The common length of packed sequences for which attention has the same FLOPs as for the actual ones."""
    lengths = [length for batch in batches if batch.segments for length in batch.segments.lengths]
    return round(sum(length**2 for length in lengths) / sum(lengths))


def knots_of_sequences(widths: Sequence[int], sequence: int) -> list[int]:
    """Widths that are multiples of `sequence`, from below the smallest of the widths to above the largest."""
    counts = {min(widths) // sequence, round(median(widths) / sequence), -(-max(widths) // sequence)}
    return [n * sequence for n in sorted({max(1, n) for n in counts})]


def interpolation_weights(values: Sequence[int], at: Sequence[int]) -> list[float]:
    """The weight of each knot in the sum over the values, by linear inter- and extrapolation."""
    if len(at) == 1:
        return [float(len(values))]
    sums = [0.0] * len(at)
    for value in values:
        left = min(max(bisect_right(at, value) - 1, 0), len(at) - 2)
        share = (value - at[left]) / (at[left + 1] - at[left])
        sums[left] += 1 - share
        sums[left + 1] += share
    return sums


def _at_knots(operators: dict[int, Operators], values: Sequence[int]) -> Operators:
    """The operators of all values, interpolated from those at knots."""
    weights = interpolation_weights(values, list(operators))
    return total(scale(each, weight) for each, weight in zip(operators.values(), weights, strict=True))
