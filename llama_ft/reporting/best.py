"""The best runs: the lowest in one figure, or the Pareto front of several."""

import math
from collections.abc import Sequence

from llama_ft.records.result import Result
from llama_ft.reporting.results import Group, value_of

COSTS = {"peak_memory_mib": "peak memory, MiB", "runtime_s": "runtime, s"}
LOSS = "eval_loss"
FRONT = (*COSTS, LOSS)
LEAST_RUNS = 3  # for a front to be shown

Point = tuple[float, ...]


def front(points: Sequence[Point]) -> list[int]:
    """The places of the points that no other beats, by being no larger in any coordinate and smaller in one."""

    def beats(a: Point, b: Point) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [n for n, point in enumerate(points) if not any(beats(other, point) for other in points)]


def figures_of(result: Result, objective: Sequence[str]) -> dict[str, float]:
    """A finished run's figures that are finite; without an objective the held-out loss, else that after training."""
    default = LOSS if result.eval_loss is not None else "train_loss_after"
    known = {key: value_of(result, key) for key in objective or (default,) if result.status == "ok"}
    return {key: value for key, value in known.items() if value is not None and math.isfinite(value)}


def objective_of(result: Result, objective: Sequence[str]) -> float | list[float] | None:
    """The value or values that the sweeper is to minimize; None counts as a failed trial.

    A run that was killed, or stopped by an error, has None. Out of memory and diverged training have infinity: other
    settings will do better. With several figures they have None too, as Optuna's TPE needs it.
    """
    if result.status not in ("ok", "oom") and not result.has_diverged:
        return None
    values = list(figures_of(result, objective).values())
    if len(objective) > 1:
        return values if len(values) == len(objective) else None
    return values[0] if values else math.inf


def best_lines(groups: Sequence[Group], objective: Sequence[str]) -> list[str]:
    """For display: the run with the lowest objective and its folder; of several, the runs that no other beats."""
    found = [(figures_of(row.result, objective), row.folder) for group in groups for row in group.rows]
    found = [(figures, folder) for figures, folder in found if len(figures) == max(1, len(objective))]
    best = [found[n] for n in front([tuple(figures.values()) for figures, _ in found])]
    lines = [f"{', '.join(f'{key} {value:.6g}' for key, value in values.items())}: {folder}" for values, folder in best]
    if len(objective) < 2:
        return [f"best: {line}" for line in lines[:1]]
    return [f"Pareto-optimal in {' and '.join(objective)}:", *(f"  {line}" for line in lines)]


def measured(group: Group) -> dict[int, Point]:
    """Memory, time and held-out loss of the group's runs that have all three, by their places in it."""
    known = [figures_of(result, FRONT).values() for result in group.results]
    points = {  # rounded as they are shown
        n: tuple(float(f"{value:.4g}") for value in values)
        for n, values in enumerate(known)
        if len(values) == len(FRONT)
    }
    return points if len(points) >= LEAST_RUNS and len(held_out_counts(group)) <= 1 else {}


def held_out_counts(group: Group) -> list[float]:
    """The numbers of held-out samples of the group's runs; losses of different samples must not be compared."""
    return sorted({r.eval_samples for r in group.results if r.eval_loss is not None and r.eval_samples is not None})


def members(group: Group) -> list[int]:
    """The places of the group's runs on the front of memory, time and held-out loss, the lowest loss first."""
    points = measured(group)
    places = list(points)
    return sorted((places[n] for n in front(list(points.values()))), key=lambda n: points[n][-1])
