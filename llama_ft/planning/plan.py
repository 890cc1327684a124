"""Makes a plan: rows for combinations and cards, and the settings behind them."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from llama_ft.config import TECHNIQUES, Combinations, GpuConfig, OptimConfig, PlanConfig, path_of
from llama_ft.config.plan import row_settings
from llama_ft.config.techniques import combinations
from llama_ft.device import versions
from llama_ft.planning.advice import Adviser
from llama_ft.planning.calibration import Runs, calibrate, measured_runs
from llama_ft.planning.lengths import Lengths
from llama_ft.planning.predict import predict
from llama_ft.planning.table1 import table1
from llama_ft.records.plan import Plan, PlannedData, PlannedTime, PlanRow
from llama_ft.system import Progress, no_progress

AT_BEST = PlannedTime("bound", "at best: each operator at the full rate of the card's matrix units or memory")


def make_plan(
    runs: Sequence[PlanConfig],
    gpus: list[GpuConfig],
    lengths: Lengths,
    data: PlannedData,
    command: str,
    progress: Progress = no_progress,
    profiles: Sequence[GpuConfig] = (),
    held_out: Lengths = (),
) -> Plan:
    """Plan the runs of a sweep, or the combinations of a single run; `profiles` are all known cards, for advice.

    A UserError if the runs can begin nowhere.
    """
    config, settings, own = runs[0], runs[0].to_dict(), row_settings(runs)
    measured = measured_runs(path_of(config.calibrate), gpus) if config.calibrate else None
    config, *runs = (_cut(run, len(lengths)) for run in (config, *rows_for(runs)))
    all_rows = predict(_compared(config) if config.goal else runs, gpus, lengths, progress, held_out)
    rows = [row for row in all_rows if OptimConfig(**row.optim) in [run.optim for run in runs]]
    for row, values in zip(rows, own * len(gpus), strict=True) if len(own) > 1 else ():
        row.settings = values
    plan = Plan(
        command=command,
        versions=versions(),
        model=config.model.name,
        data=data,
        techniques={each.name: settings[each.name] for each in TECHNIQUES},
        training=settings["training"],
        gpus=[asdict(gpu) | {"device": gpu.device.name} for gpu in gpus],
        time=calibrate(all_rows, *measured) if measured else AT_BEST,
        rows=rows,
    )
    if config.combinations is Combinations.all:
        plan.table1 = table1(config, gpus[0], lengths, plan.rows, progress)
    if config.goal:
        more = partial(_calibrated_rows, measured, lengths=lengths, progress=progress, held_out=held_out)
        plan.advice = Adviser(config, all_rows, gpus, profiles, lengths, progress, plan.time.kind, more).advise()
    return plan


def _calibrated_rows(measured: tuple[Runs, str] | None, *runs_and_cards: Any, **others: Any) -> list[PlanRow]:
    rows = predict(*runs_and_cards, **others)
    if measured:
        calibrate(rows, *measured)
    return rows


def rows_for(runs: Sequence[PlanConfig]) -> Sequence[PlanConfig]:
    """The runs to make rows for: a sweep's, or the combinations of a single run."""
    if len(runs) > 1 or runs[0].combinations is Combinations.one:
        return runs
    return [replace(runs[0], optim=optim) for optim in combinations(runs[0].both)]


def _compared(config: PlanConfig) -> list[PlanConfig]:
    """The combinations that advice compares: of all techniques that save memory, and of those in the config."""
    more = [each.name for each in TECHNIQUES if not each.in_course and (each.saves or each.name in config.both)]
    return [replace(config, optim=optim) for optim in combinations(more)]


def _cut(run: PlanConfig, n_samples: int) -> PlanConfig:
    """The run with no micro-batch larger than the data."""
    size = min(run.training.micro_batch_size, n_samples)
    return replace(run, training=replace(run.training, micro_batch_size=size))
