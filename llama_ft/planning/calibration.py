"""How fast a device is, learned from runs that were measured there, so that a bound on time becomes an estimate.

A run's time is taken as a sum: so many seconds for each unit of each resource that it uses. On a card whose rates are
known the units are the bound's own seconds (`roofline.py`), and what is learned are efficiencies, of 1 at most;
elsewhere they are FLOPs in a matrix format, bytes moved, and bytes written to blocks that the system has just given. An
operator costs something by itself too. Each optimizer step of each run is an equation, by the times in `metrics.jsonl`;
steps differ in their lengths, so two runs hold more than two of them. What is solved is least squares of relative
errors without negative costs; each run counts the same.

The runs say nothing of what they did not use, or used in fixed proportion to something else. A run whose time would
depend on that gets no time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from llama_ft.config import GpuConfig, TrainConfig, UserError
from llama_ft.data.dataset import Sample
from llama_ft.planning.card import traits_of
from llama_ft.planning.operators import Operators, bytes_of, flops_of, mapped_bytes_of
from llama_ft.planning.roofline import RATES, by_resource
from llama_ft.planning.run_costs import step_costs

FORMATS = tuple(RATES)  # PyTorch's names
OPERATORS, BYTES, NEW_BLOCKS = "operators", "bytes", "new blocks"
CUDA_GROUP = 8  # steps; there a step's line in metrics.jsonl is written while the next one is already under way
MOST_UNCERTAIN = 0.25  # standard error of a run's time, as a share of it, beyond which the runs do not tell it
LEAST_ERROR, SINGULAR = 1e-2, 1e-12  # no time is known better than this share of it; no eigenvalue, than this
MOST_BEYOND = 2.0  # how much more of a resource that seemed to cost nothing a run may use, for its time, than the runs

Amounts = dict[str, float]  # how much of each resource


@dataclass(frozen=True)
class Measured:
    """A run that was measured, as equations."""

    name: str
    seconds: Tensor  # float64 [equations]
    amounts: list[Amounts]  # one for each equation


@dataclass(frozen=True)
class Calibration:
    """What was learned."""

    cost: Amounts  # seconds a unit
    covariance: Tensor  # float64, of the costs, in their order
    most_used: Amounts  # units a second, the most in any of the runs

    def seconds(self, amounts: Amounts) -> float:
        """The time of a run that uses so much.

        Raises:
            UserError: saying what of it the runs did not show.
        """
        if unknown := [name for name, amount in amounts.items() if amount and not self.most_used.get(name)]:
            raise UserError(f"none of the runs used {' or '.join(map(in_words, unknown))}")
        used = torch.tensor([amounts.get(name, 0.0) for name in self.cost], dtype=torch.float64)
        seconds = sum(amounts.get(name, 0.0) * cost for name, cost in self.cost.items())
        error = sqrt(max(0.0, float(used @ self.covariance @ used)))
        if not error <= MOST_UNCERTAIN * seconds:
            raise UserError("the runs do not tell apart the costs that it depends on: add runs of other combinations")
        for name, cost in self.cost.items():
            if not cost and amounts.get(name, 0.0) > MOST_BEYOND * self.most_used[name] * seconds:
                raise UserError(f"{in_words(name)} cost nothing that could be seen in the runs, and are many more here")
        return seconds


def in_words(resource: str) -> str:
    """A resource, for people."""
    if resource in FORMATS or resource in RATES.values():
        return f"matrix products in {resource}"
    return {NEW_BLOCKS: "bytes of new blocks", BYTES: "bytes moved"}.get(resource, resource)


def resources(gpu: GpuConfig, operators: Operators) -> Amounts:
    """How much operators use of each resource of a device."""
    return amounts(
        gpu,
        flops_of(operators),
        bytes_of(operators),
        mapped_bytes_of(operators),
        by_resource(operators, gpu),
        sum(operators.values()),
    )


def amounts(
    gpu: GpuConfig,
    flops: dict[str, float],
    bytes_moved: float,
    mapped_bytes: float,
    bound_s: dict[str, float] | None,
    n_operators: float,
) -> Amounts:
    """The same, of what a row of `plan.json` holds."""
    if bound_s is not None:
        return bound_s | {OPERATORS: n_operators}
    # CUDA's allocator keeps its blocks.
    new = {} if traits_of(gpu).on_cuda else {NEW_BLOCKS: mapped_bytes}
    return flops | {BYTES: bytes_moved, OPERATORS: n_operators} | new


def measured(
    name: str, config: TrainConfig, samples: Sequence[Sample], gpu: GpuConfig, runtime_s: float, lines: list[Any]
) -> Measured:
    """A run as equations: its optimizer steps where each has a line, else the whole of it.

    Args:
        gpu: of the plan.
        lines: of metrics.jsonl.

    Raises:
        UserError: as `fake_step` does.
    """
    parts, shares = step_costs(config, samples, traits_of(gpu))
    of_parts = [resources(gpu, part) for part in parts]
    names = list(dict.fromkeys(key for part in of_parts for key in part))
    table = shares @ torch.tensor([[part.get(key, 0.0) for key in names] for part in of_parts], dtype=torch.float64)
    at = torch.tensor([0.0, *(line["time_s"] for line in lines)], dtype=torch.float64)
    if len(lines) == len(table):
        seconds = at.diff()
        if traits_of(gpu).on_cuda:
            seconds, table = _grouped(seconds), _grouped(table)
    else:
        seconds, table = torch.tensor([runtime_s], dtype=torch.float64), table.sum(0, keepdim=True)
    return Measured(name, seconds, [dict(zip(names, row, strict=True)) for row in table.tolist()])


def _grouped(values: Tensor) -> Tensor:
    """Sums of steps that follow each other."""
    return torch.stack([group.sum(0) for group in values.split(CUDA_GROUP)])


def learn(runs: Sequence[Measured], least: Callable[[str], float] = lambda resource: 0.0) -> Calibration:
    """The costs that fit the runs best.

    Args:
        least: the least that a unit of a resource can cost.

    Raises:
        UserError: if there is no run, or none that took any time.
    """
    names = list(dict.fromkeys(key for run in runs for each in run.amounts for key, n in each.items() if n > 0))
    if not names:
        raise UserError("there is no measured run to learn from")
    most: Amounts = dict.fromkeys(names, 0.0)
    tables, times = [], []
    for run in runs:
        table = torch.tensor([[each.get(key, 0.0) for key in names] for each in run.amounts], dtype=torch.float64)
        total = float(run.seconds.sum())
        weight = sqrt(len(run.seconds)) / total  # of relative errors, whose squares' mean over a run counts
        for key, amount in zip(names, table.sum(0).tolist(), strict=True):
            most[key] = max(most[key], amount / total)
        tables.append(table * weight)
        times.append(run.seconds * weight)
    table, time = torch.cat(tables), torch.cat(times)
    floor = torch.tensor([least(name) for name in names], dtype=torch.float64)
    cost = floor + non_negative(table, time - table @ floor)
    spread = float((table @ cost - time).square().sum()) / max(1, len(time) - len(names))
    covariance = max(spread, LEAST_ERROR**2 / len(runs)) * _inverse_square(table)
    return Calibration(dict(zip(names, cost.tolist(), strict=True)), covariance, most)


def _inverse_square(table: Tensor) -> Tensor:
    """The inverse of table' table; very large, not infinite, where the columns do not tell the unknowns apart."""
    scale = table.abs().amax(0)
    values, vectors = torch.linalg.eigh((table / scale).T @ (table / scale))
    inverse = vectors / values.clamp_min(SINGULAR * float(values[-1])) @ vectors.T
    covariance: Tensor = inverse / torch.outer(scale, scale)
    return covariance


def non_negative(table: Tensor, target: Tensor) -> Tensor:
    """Non-negative least squares, exact: the best of the solutions over each set of columns that has no negative part.

    Args:
        table: [equations, unknowns], of which there are few.
        target: [equations].
    """
    scale = table.abs().amax(0).clamp_min(torch.finfo(table.dtype).tiny)
    table, n = table / scale, table.shape[1]
    best, least = torch.zeros(n, dtype=table.dtype), float(target.square().sum())
    for size in range(1, n + 1):
        for columns in map(list, combinations(range(n), size)):
            part = torch.linalg.pinv(table[:, columns]) @ target
            error = float((table[:, columns] @ part - target).square().sum())
            if part.min() >= 0 and error < least:
                least, best = error, torch.zeros(n, dtype=table.dtype).index_copy(0, torch.tensor(columns), part)
    return best / scale
