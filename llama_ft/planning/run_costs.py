"""All that a run computes and moves, from a few fake steps.

A step's operators depend on its micro-batches' widths and numbers of targets, and are linear in the number of layers,
or of groups of layers that are checkpointed together. So steps are run at a few widths and numbers of targets, on
one layer or group and on two; between and beyond them is a line. Packed rows are run with sequences of one length,
for which attention costs what it costs for the data's.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from llama_ft.config import TrainConfig
from llama_ft.data.collate import Batch
from llama_ft.data.records import Sample
from llama_ft.planning.fake_run import fake_step, give_gradients, micro_batch, update, windows_of
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.operators import OperatorCounter, Operators, scale, total

N_KNOTS = 3  # widths, and numbers of targets, at which steps are run


@dataclass(frozen=True)
class RunCosts:
    """A run's operators, all of them, and what they are for."""

    operators: Operators
    steps: int  # optimizer steps
    samples: int
    tokens: int  # as the run counts them: of the samples, padding not


@dataclass(frozen=True)
class StepOperators:
    """The operators of parts of a step."""

    by_width: dict[int, Operators]  # of a micro-batch with one target
    by_targets: dict[int, Operators]  # what so many targets, instead of one, add to a micro-batch
    accumulated: Operators  # what a micro-batch costs more whose gradients are added to those of another
    update: Operators  # of what follows the last backward pass of a step


def run_costs(configs: Sequence[TrainConfig], samples: Sequence[Sample], traits: Traits) -> list[RunCosts]:
    """The operators of whole runs; they differ only in techniques which do not change those of a micro-batch."""
    config, training = configs[0], configs[0].training
    data = windows_of(config, samples, traits)
    batches = [batch for window in data.epoch(0) for batch in window]
    # Other epochs' widths and targets differ where a micro-batch has several samples, and only there.
    shapes = [(batch.tokens.shape[1], batch.n_targets) for batch in batches]
    widths, targets = [width for width, _ in shapes], [n_targets for _, n_targets in shapes]
    layers = depths(config)
    n_steps = [windows_of(each, samples, traits).steps_per_epoch for each in configs]
    accumulates = min(n_steps) < len(batches)
    sequence = None if training.packing is None else mean_sequence(batches)
    size = min(training.micro_batch_size, data.most_samples) if sequence is None else 1
    at = knots(widths) if sequence is None else knots_of_sequences(widths, sequence)
    steps = [
        # Targets concern the head alone.
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
    """Numbers of layers at which steps are run, and how much of each makes the model's."""
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

    `sequence` is how long those are that lie end to end in a row; None without packing. `size` is how many rows a
    micro-batch has.
    """
    config = replace(config, model=replace(config.model, n_layers=n_layers))
    with fake_step(config, traits) as step:

        def count(width: int, n_targets: int = 1, n_micro_batches: int = 1) -> Operators:
            batch = micro_batch(width, n_targets, size, sequence)
            return _counted(lambda: step([batch] * n_micro_batches))

        give_gradients(step)
        update(step)  # makes the optimizer's state
        give_gradients(step)
        after = _counted(lambda: update(step))
        one = {width: count(width) for width in widths}
        per_sample = sorted({min(max(1, round(n / size)), widths[-1]) for n in targets})
        shortest, longest = one[widths[0]], one[widths[-1]]
        accumulated: Operators = Counter()
        if accumulates:  # two micro-batches and an update, less twice one with its update, and an update again
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
    """A few of the values, the smallest and the largest among them, with about as many values between each two."""
    ordered = sorted(values)
    return sorted({ordered[(len(values) - 1) * index // (N_KNOTS - 1)] for index in range(N_KNOTS)})


def mean_sequence(batches: Sequence[Batch]) -> int:
    """The length of which the sequences of packed rows could all be, for the same FLOPs of attention."""
    lengths = [length for batch in batches if batch.segments for length in batch.segments.lengths]
    return round(sum(length**2 for length in lengths) / sum(lengths))


def knots_of_sequences(widths: Sequence[int], sequence: int) -> list[int]:
    """Widths of rows of such sequences, from below the smallest of the widths to above the largest."""
    counts = {min(widths) // sequence, round(median(widths) / sequence), -(-max(widths) // sequence)}
    return [n * sequence for n in sorted({max(1, n) for n in counts})]


def interpolation_weights(values: Sequence[int], at: Sequence[int]) -> list[float]:
    """How much of each knot the values are together, by lines between the knots, and beyond the last two."""
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
    """The operators of all values, from those at knots."""
    weights = interpolation_weights(values, list(operators))
    return total(scale(each, weight) for each, weight in zip(operators.values(), weights, strict=True))
