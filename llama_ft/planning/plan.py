"""A plan: rows for combinations and cards, and what they are rows of."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from llama_ft.config import TECHNIQUES, Combinations, GpuConfig, OptimConfig, PlanConfig
from llama_ft.config.techniques import combinations
from llama_ft.device import versions
from llama_ft.planning.advice import Adviser
from llama_ft.planning.calibration import calibrate, measured_runs
from llama_ft.planning.lengths import Lengths
from llama_ft.planning.predict import predict
from llama_ft.planning.table1 import table1
from llama_ft.records.plan import Plan, PlannedData, PlannedTime
from llama_ft.system import Progress, no_progress

AT_BEST = PlannedTime("bound", "at best: each operator at the full rate of the card's matrix units or memory")


def make_plan(
    config: PlanConfig,
    gpus: list[GpuConfig],
    lengths: Lengths,
    data: PlannedData,
    command: str,
    progress: Progress = no_progress,
    profiles: Sequence[GpuConfig] = (),
    held_out: Lengths = (),
) -> Plan:
    """Plan what is asked for; `command` is what the user typed, `profiles` all known cards, for advice.

    Raises:
        UserError: if what is asked for can run nowhere.
    """
    measured = measured_runs(Path(os.path.expanduser(config.calibrate)), gpus) if config.calibrate else None
    settings, optims = config.to_dict(), planned_combinations(config)
    size = min(config.training.micro_batch_size, len(lengths))  # no micro-batch is larger than the data
    config = replace(config, training=replace(config.training, micro_batch_size=size))
    more = [each.name for each in TECHNIQUES if not each.in_course and (each.saves or each.name in config.both)]
    compared = list(combinations(more)) if config.goal else optims
    all_rows = predict(config, compared, gpus, lengths, progress, held_out)
    plan = Plan(
        command=command,
        versions=versions(),
        model=config.model.name,
        data=data,
        techniques={each.name: settings[each.name] for each in TECHNIQUES},
        training=settings["training"],
        gpus=[asdict(gpu) | {"device": gpu.device.name} for gpu in gpus],
        time=calibrate(all_rows, *measured) if measured else AT_BEST,
        rows=[row for row in all_rows if OptimConfig(**row.optim) in optims],
    )
    if config.combinations is Combinations.all:
        plan.table1 = table1(config, gpus[0], lengths, plan.rows, progress)
    if config.goal:
        plan.advice = Adviser(config, all_rows, gpus, profiles, lengths, progress, plan.time.kind).advise()
    return plan


def planned_combinations(config: PlanConfig) -> list[OptimConfig]:
    """The combinations that are asked for."""
    return [config.optim] if config.combinations is Combinations.one else list(combinations(config.both))
