"""Runs of the same settings under several seeds as one result: their means and their spread."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any, NamedTuple

from llama_ft.records.plan import PlanRow
from llama_ft.records.result import Result

CONFIDENCE = 0.95
INTERVALS = 400  # of Simpson's rule, which leave an error below 1e-9
LARGEST_T = 20.0  # the quantile of one degree of freedom is 12.7, and the others' are smaller


class Run(NamedTuple):
    """A run with its folder, and its seed if that tells it from others of the same row."""

    result: Result
    folder: Path = Path()  # of a plan's row none
    seed: int | str | None = None  # a text for a refused run

    def named(self, name: str) -> str:
        """The run's name, in a row of this name."""
        return name if self.seed is None else f"{name} (seed {self.seed})"


@dataclass
class Repeated(Result):
    """Several runs as one: numbers are means over those that finished, everything else is the first's."""

    runs: list[Run] = field(default_factory=list)


def repeated(runs: list[Run]) -> Repeated:
    """Make one result of runs that differ only in their seed, ok if one of them is."""
    ordered = sorted(runs, key=lambda run: (isinstance(run.seed, str), run.seed))
    results = [run.result for run in ordered]
    parts = ([result for result in results if result.status == status] for status in ("ok", "oom"))
    counted = next(filter(None, parts), results)
    values = {each.name: _mean([getattr(result, each.name) for result in counted]) for each in fields(Result)}
    return Repeated(**values, runs=ordered)


def _mean(values: list[Any]) -> Any:
    """The common value, the mean of numbers (of dicts of numbers, by key), else the first value; None is left out."""
    known = [value for value in values if value is not None]
    if not known or all(value == known[0] for value in known):
        return next(iter(known), None)
    if _are_numbers(known):
        return fmean(known)
    if isinstance(known[0], dict) and _are_numbers(known[0].values()):
        return {key: fmean(value.get(key, 0.0) for value in known) for key in known[0]}
    return known[0]


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def runs_of(result: Result, folder: Path = Path()) -> list[Run]:
    """The runs behind a result; `folder` is that of a single one."""
    return result.runs if isinstance(result, Repeated) else [Run(result, folder)]


def values_of(record: Result | PlanRow, key: str) -> list[float]:
    """A number of each repeat that finished; empty if nothing was repeated."""
    runs = record.runs if isinstance(record, Repeated) else []
    values = [getattr(run.result, key) for run in runs if run.result.status == "ok"]
    return [value for value in values if value is not None]


def spread_of(record: Result | PlanRow, key: str) -> float | None:
    """The half-width of the confidence interval of a mean; None if there are no two repeats, or all are equal."""
    values = values_of(record, key)
    return half_width(values) or None if len(values) > 1 and all(map(math.isfinite, values)) else None


def half_width(values: list[float]) -> float:
    """Half of the 95 % confidence interval of the mean of two or more values, by Student's t: t s / sqrt(n)."""
    return t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def are_apart(a: list[float], b: list[float]) -> bool | None:
    """Return True if two means differ significantly at 95 %; None if a side has fewer than two values.

    Welch's t-test, which does not assume equal variances: B. L. Welch, The generalization of "Student's" problem
    when several different population variances are involved, Biometrika 34 (1947).
    """
    if min(len(a), len(b)) < 2 or not all(map(math.isfinite, (*a, *b))):
        return None
    of_a, of_b = variance(a) / len(a), variance(b) / len(b)
    difference = abs(fmean(a) - fmean(b))
    if of_a + of_b == 0:
        return difference > 0
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return t_probability(difference / math.sqrt(of_a + of_b), freedom) > CONFIDENCE


def t_probability(t: float, freedom: float) -> float:
    """The probability of |T| <= t for Student's t with `freedom` degrees of freedom, which need not be whole.

    The integral of the density (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.1) with
    T = sqrt(freedom) tan(x): of cos(x) ** (freedom - 1), by Simpson's rule.
    """
    end = math.atan(t / math.sqrt(freedom))
    heights = [math.pow(math.cos(end * n / INTERVALS), freedom - 1) for n in range(INTERVALS + 1)]
    integral = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    return 2 / math.sqrt(math.pi) * scale * integral * end / (3 * INTERVALS)


@cache
def t_quantile(freedom: int) -> float:
    """The t with |T| <= t at 95 %: 12.706 for one degree of freedom, 4.303 for two, 1.960 for very many."""
    low, high = 0.0, LARGEST_T
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < CONFIDENCE else (low, middle)
    return high
