"""How fast a device is, learned from runs that were measured there, so that a bound on time becomes an estimate.

A run's time is taken as a sum: so many seconds for each unit of each resource that it uses. On a card whose rates are
known the units are the bound's own seconds (`roofline.py`), and what is learned are efficiencies, of 1 at most;
elsewhere they are FLOPs in a matrix format, bytes moved, and bytes written to blocks that the system has just given. An
operator costs something by itself too. Each optimizer step of each run is an equation, by the times in `metrics.jsonl`;
steps differ in their lengths, so two runs hold more than two of them. What is solved is least squares of relative
errors without negative costs; each run counts the same.

Few runs leave open what part of their time a resource took that goes up and down with another one, in most of them. So
all sets of costs are kept that explain the runs about equally well, each with as few resources as it can do with. The
best of them gives a run's time, and the others how far off it may be. A run whose time may be too far off gets none,
nor does one that uses what the runs did not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from llama_ft.config import GpuConfig, TrainConfig, UserError
from llama_ft.data.dataset import Sample
from llama_ft.planning.gpu_traits import traits_of
from llama_ft.planning.operators import Operators, bytes_of, flops_of, mapped_bytes_of
from llama_ft.planning.roofline import RATES, by_resource
from llama_ft.planning.run_costs import step_costs

FORMATS = tuple(RATES)  # PyTorch's names
OPERATORS, BYTES, NEW_BLOCKS = "operators", "bytes", "new blocks"
CUDA_GROUP = 8  # steps; there a step's line in metrics.jsonl is written while the next one is already under way
MAX_UNCERTAINTY = 0.25  # how far off a run's time may be, as a share of it
MIN_ERROR, SINGULAR = 1e-2, 1e-12  # no step is known better than this share of it; no eigenvalue, than this
ABOUT_AS_GOOD = 4.0  # variances that the squares of errors may add up to beyond the least: two standard errors
# How much more of a resource that seemed to cost nothing a run may use, for its time, than the runs: a twentieth of
# their time may have passed unseen, and would be a quarter of this one's.
MAX_BEYOND = 5.0

Amounts = dict[str, float]  # how much of each resource


@dataclass(frozen=True)
class Measured:
    """A run that was measured, as equations."""

    name: str
    seconds: Tensor  # float64 [equations]
    amounts: list[Amounts]  # one for each equation


@dataclass(frozen=True)
class Fit:
    """Costs of some resources that explain the runs, if the others cost nothing."""

    cost: Tensor  # float64 [resources], seconds a unit
    error: float  # sum of squares
    covariance: Tensor  # of the costs, where an equation's error has variance 1


@dataclass(frozen=True)
class Calibration:
    """What was learned."""

    fits: list[Fit]  # about equally good, the best one first
    variance: float  # of an equation's error
    most_used: Amounts  # of each resource units a second, the most in any of the runs

    @property
    def cost(self) -> Amounts:
        """Seconds a unit by the best of the fits."""
        return dict(zip(self.most_used, self.fits[0].cost.tolist(), strict=True))

    def seconds(self, amounts: Amounts) -> float:
        """The time of a run that uses so much.

        Raises:
            UserError: saying what of it the runs did not show.
        """
        if unknown := [name for name, amount in amounts.items() if amount and not self.most_used.get(name)]:
            raise UserError(f"none of the runs used {' or '.join(map(in_words, unknown))}")
        used = torch.tensor([amounts.get(name, 0.0) for name in self.most_used], dtype=torch.float64)
        times = [float(used @ fit.cost) for fit in self.fits]
        errors = [sqrt(self.variance * max(0.0, float(used @ fit.covariance @ used))) for fit in self.fits]
        seconds = times[0]
        off = max(abs(time - seconds) + error for time, error in zip(times, errors, strict=True))
        if not off <= MAX_UNCERTAINTY * seconds:
            raise UserError("the runs do not tell apart the costs that it depends on: add runs of other combinations")
        for place, (name, most_used) in enumerate(self.most_used.items()):
            costs_nothing = not any(fit.cost[place] for fit in self.fits)
            if costs_nothing and float(used[place]) > MAX_BEYOND * most_used * seconds:
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
    fits = non_negative_fits(table, time - table @ floor)
    variance = max(fits[0].error / max(1, len(time) - len(names)), MIN_ERROR**2 * len(runs) / len(time))
    good = [fit for fit in fits if fit.error <= fits[0].error + ABOUT_AS_GOOD * variance]
    return Calibration([replace(fit, cost=floor + fit.cost) for fit in good], variance, most)


def non_negative_fits(table: Tensor, target: Tensor) -> list[Fit]:
    """Least squares over each set of columns that has one answer, where no part of it is negative; the best one first.

    The first is the non-negative least squares of all columns.

    Args:
        table: [equations, unknowns], of which there are few.
        target: [equations].
    """
    scale = table.abs().amax(0).clamp_min(torch.finfo(table.dtype).tiny)
    table, n = table / scale, table.shape[1]
    nothing = torch.zeros(n, dtype=table.dtype)
    fits = [Fit(nothing, float(target.square().sum()), torch.zeros(n, n, dtype=table.dtype))]
    for columns in (list(chosen) for size in range(1, n + 1) for chosen in combinations(range(n), size)):
        part, at = table[:, columns], torch.tensor(columns)
        values, vectors = torch.linalg.eigh(part.T @ part)
        if values[0] <= SINGULAR * values[-1]:
            continue  # fewer columns do as well
        inverse = vectors / values @ vectors.T
        cost = torch.linalg.lstsq(part, target).solution
        if cost.min() < 0:
            continue
        covariance = torch.zeros(n, n, dtype=table.dtype)
        covariance[at[:, None], at] = inverse
        whole = nothing.index_copy(0, at, cost) / scale
        fits.append(Fit(whole, float((part @ cost - target).square().sum()), covariance / torch.outer(scale, scale)))
    return sorted(fits, key=lambda fit: fit.error)
