"""What is best among runs: the least of one figure; of several the Pareto front."""

import math
from collections.abc import Sequence

from llama_ft.records.result import Result
from llama_ft.reporting.results import Group, value_of

COSTS = {"peak_memory_mib": "peak memory, MiB", "runtime_s": "runtime, s"}
LOSS = "eval_loss"
FRONT = (*COSTS, LOSS)
LEAST_RUNS = 3  # that a front is shown of

Point = tuple[float, ...]


def front(points: Sequence[Point]) -> list[int]:
    """The places of the points that no other beats, by being as small in all coordinates and smaller in one."""

    def beats(a: Point, b: Point) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [n for n, point in enumerate(points) if not any(beats(other, point) for other in points)]


def figures_of(result: Result, objective: Sequence[str]) -> dict[str, float]:
    """Those figures of a finished run that are finite numbers; of none the held-out loss, else that after training."""
    default = LOSS if result.eval_loss is not None else "train_loss_after"
    known = {key: value_of(result, key) for key in objective or (default,) if result.status == "ok"}
    return {key: value for key, value in known.items() if value is not None and math.isfinite(value)}


def objective_of(result: Result, objective: Sequence[str]) -> float | list[float] | None:
    """What a run tells the sweeper, to be minimized; None, which is nothing, counts as a failed trial.

    Of a run that was killed, or stopped by an error, it is nothing. Out of memory is infinite, and so is training that
    has diverged: other settings will do better. Beside a second figure it is nothing, which Optuna's TPE needs there.
    """
    if result.status not in ("ok", "oom") and not result.has_diverged:
        return None
    values = list(figures_of(result, objective).values())
    if len(objective) > 1:
        return values if len(values) == len(objective) else None
    return values[0] if values else math.inf


def best_lines(groups: Sequence[Group], objective: Sequence[str]) -> list[str]:
    """For people: the run with the least objective and its folder; of several, those that no other run beats."""
    runs = [run for group in groups for run in zip(group.results, group.folders, strict=True)]
    found = [(figures_of(result, objective), folder) for result, folder in runs]
    found = [(figures, folder) for figures, folder in found if len(figures) == max(1, len(objective))]
    best = [found[n] for n in front([tuple(figures.values()) for figures, _ in found])]
    lines = [f"{', '.join(f'{key} {value:.6g}' for key, value in values.items())}: {folder}" for values, folder in best]
    if len(objective) < 2:
        return [f"best: {line}" for line in lines[:1]]
    return [f"Pareto-optimal in {' and '.join(objective)}:", *(f"  {line}" for line in lines)]


def measured(group: Group) -> dict[int, Point]:
    """Memory, time and held-out loss of the group's runs that have all three, by their places in it."""
    known = [figures_of(result, FRONT).values() for result in group.results]
    points = {  # as they are shown
        n: tuple(float(f"{value:.4g}") for value in values)
        for n, values in enumerate(known)
        if len(values) == len(FRONT)
    }
    return points if len(points) >= LEAST_RUNS and len(held_out_counts(group)) <= 1 else {}


def held_out_counts(group: Group) -> list[float]:
    """On how many samples its runs' held-out losses are; losses of other samples are not to be compared."""
    return sorted({r.eval_samples for r in group.results if r.eval_loss is not None and r.eval_samples is not None})


def members(group: Group) -> list[int]:
    """The places of the group's runs on the front of memory, time and held-out loss, the least loss first."""
    points = measured(group)
    places = list(points)
    return sorted((places[n] for n in front(list(points.values()))), key=lambda n: points[n][-1])


def front_notes(group: Group) -> list[str]:
    """A table's line about the front; nothing where there are too few runs."""
    names = "; ".join(group.labels[n] for n in members(group))
    return [f"Pareto-optimal in memory, time and held-out loss: {names}."] if names else []
