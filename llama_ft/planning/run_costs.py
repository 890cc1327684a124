"""All that a run computes and moves, from a few fake steps.

A step's operators depend on its micro-batches' widths and numbers of targets, and are linear in the number of layers,
or of groups of layers that are checkpointed together. So steps are run at a few widths and numbers of targets, on
one layer or group and on two; between and beyond them is a line.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_ft.config import TrainConfig
from llama_ft.data.collate import Padding, epoch_batches
from llama_ft.data.dataset import Sample
from llama_ft.planning.fake_run import fake_step, give_gradients, micro_batch, padding_of, update
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.operators import OperatorCounter, Operators, less, times, total
from llama_ft.techniques.gradient_accumulation import windows

N_NODES = 3  # widths, and numbers of targets, at which steps are run


@dataclass(frozen=True)
class RunCosts:
    """A run's operators, all of them, and what they are for."""

    operators: Operators
    steps: int  # optimizer steps
    samples: int
    tokens: int  # as the run counts them: of the samples, padding not


@dataclass(frozen=True)
class Shapes:
    """The micro-batches of one epoch."""

    widths: list[int]  # padded
    targets: list[int]


def shapes(config: TrainConfig, samples: Sequence[Sample], padding: Padding) -> Shapes:
    """Those of the first epoch; the others' differ where a micro-batch has several samples, and only there."""
    training = config.training
    batches = list(epoch_batches(samples, training.micro_batch_size, 0, training.seed, padding))
    return Shapes([batch.tokens.shape[1] for batch in batches], [batch.n_targets for batch in batches])


def run_costs(configs: Sequence[TrainConfig], samples: Sequence[Sample], traits: Traits) -> list[RunCosts]:
    """The operators of whole runs that differ in gradient accumulation alone.

    Raises:
        UserError: as `fake_step` does.
    """
    config = configs[0]
    padding = padding_of(config, traits)
    found = shapes(config, samples, padding)
    accumulations = [each.ga.steps if each.optim.ga else 1 for each in configs]
    at_depth = depths(config)
    per_depth = [step_operators(config, n, found, traits, max(accumulations) > 1) for n in at_depth]
    epochs, tokens = config.training.epochs, sum(len(sample) for sample in samples)
    costs = []
    for accumulation in accumulations:
        each = [_epoch(step, found, accumulation) for step in per_depth]
        epoch = total(times(ops, n) for ops, n in zip(each, at_depth.values(), strict=True))
        epoch = total([epoch, _of_targets(per_depth[0], found)])
        n_steps = -(-len(found.widths) // accumulation) * epochs
        costs.append(RunCosts(times(epoch, epochs), n_steps, len(samples) * epochs, tokens * epochs))
    return costs


def step_costs(config: TrainConfig, samples: Sequence[Sample], traits: Traits) -> tuple[list[Operators], Tensor]:
    """What each optimizer step of a run is made of: parts, and how often each step has each of them.

    Returns:
        The parts' operators, and float64 [steps, parts].

    Raises:
        UserError: as `fake_step` does.
    """
    padding = padding_of(config, traits)
    accumulation = config.ga.steps if config.optim.ga else 1
    found, at_depth = shapes(config, samples, padding), depths(config)
    per_depth = [step_operators(config, n, found, traits, accumulation > 1) for n in at_depth]
    of_targets = dict(zip(per_depth[0].targets, per_depth[0].by_targets, strict=True))
    parts = [part for step in per_depth for part in (*step.by_width, step.accumulated, step.update)]
    rows = []
    for epoch in range(config.training.epochs):
        batches = epoch_batches(samples, config.training.micro_batch_size, epoch, config.training.seed, padding)
        for window in windows(batches, accumulation):
            widths, n_targets = [b.tokens.shape[1] for b in window], [b.n_targets for b in window]
            micro = [*weights(widths, per_depth[0].widths), len(window) - 1.0, 1.0]
            rows.append(
                [n * each for n in at_depth.values() for each in micro] + weights(n_targets, sorted(of_targets))
            )
    return parts + [of_targets[n] for n in sorted(of_targets)], torch.tensor(rows, dtype=torch.float64)


def depths(config: TrainConfig) -> dict[int, float]:
    """Numbers of layers at which steps are run, and how much of each makes the model's."""
    n_layers, group = config.model.n_layers, config.gc.every if config.optim.gc else 1
    if n_layers <= 2 * group:
        return {n_layers: 1.0}
    return {group: 2 - n_layers / group, 2 * group: n_layers / group - 1}


@dataclass(frozen=True)
class StepOperators:
    """The operators of parts of a step."""

    widths: list[int]
    by_width: list[Operators]  # of a micro-batch with one target
    targets: list[int]
    by_targets: list[Operators]  # what so many targets, instead of one, add to a micro-batch
    accumulated: Operators  # what a micro-batch costs more whose gradients are added to those of another
    update: Operators  # of what follows the last backward pass of a step


def step_operators(
    config: TrainConfig, n_layers: int, found: Shapes, traits: Traits, accumulates: bool
) -> StepOperators:
    """Run the steps; numbers of targets, which concern the head alone, at the least number of layers."""
    size = config.training.micro_batch_size
    widths, targets = nodes(found.widths), nodes(found.targets) if n_layers == min(depths(config)) else []
    config = replace(config, model=replace(config.model, n_layers=n_layers))
    with fake_step(config, traits) as step:

        def count(width: int, n_targets: int = 1, n_micro_batches: int = 1) -> Operators:
            batch = micro_batch(width, n_targets, size)
            return _counted(lambda: step([batch] * n_micro_batches))

        give_gradients(step)
        update(step)  # makes the optimizer's state
        give_gradients(step)
        after = _counted(lambda: update(step))
        one = [count(width) for width in widths]
        each = [min(max(1, round(n / size)), widths[-1]) for n in targets]
        return StepOperators(
            widths,
            [less(operators, after) for operators in one],
            [n * size for n in each],
            [less(count(widths[-1], n), one[-1]) for n in each],
            # Two micro-batches and an update, less twice one with its update, and an update again.
            total([less(less(count(widths[0], 1, 2), one[0]), one[0]), after]) if accumulates else Counter(),
            after,
        )


def _counted(run: Callable[[], object]) -> Operators:
    counter = OperatorCounter()
    with counter:
        run()
    return counter.operators


def nodes(values: Sequence[int]) -> list[int]:
    """A few of the values, the smallest and the largest among them, with about as many values between each two."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return sorted({ordered[last * place // (N_NODES - 1)] for place in range(N_NODES)})


def weights(values: Sequence[int], at: Sequence[int]) -> list[float]:
    """How much of each node the values are together, by lines between the nodes, and beyond the last two."""
    sums = [0.0] * len(at)
    for value in values:
        if len(at) == 1:
            sums[0] += 1
            continue
        left = min(max(bisect_right(at, value) - 1, 0), len(at) - 2)
        share = (value - at[left]) / (at[left + 1] - at[left])
        sums[left] += 1 - share
        sums[left + 1] += share
    return sums


def _epoch(step: StepOperators, found: Shapes, accumulation: int) -> Operators:
    """The operators of an epoch whose micro-batches have one target each."""
    n_micro = len(found.widths)
    n_steps = -(-n_micro // accumulation)
    parts = [times(ops, weight) for ops, weight in zip(step.by_width, weights(found.widths, step.widths), strict=True)]
    return total([*parts, times(step.accumulated, n_micro - n_steps), times(step.update, n_steps)])


def _of_targets(step: StepOperators, found: Shapes) -> Operators:
    """What the other targets of an epoch add."""
    by_targets = dict(zip(step.targets, step.by_targets, strict=True))  # several nodes may be one
    at = sorted(by_targets)
    return total(times(by_targets[n], weight) for n, weight in zip(at, weights(found.targets, at), strict=True))
