"""A plan: rows for combinations and cards, and what they are rows of, as `plan.json` has it."""

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from llama_ft.config import Combinations, GpuConfig, OptimConfig, PlanConfig
from llama_ft.launch.run import versions
from llama_ft.planning.advice import Adviser
from llama_ft.planning.calibration_runs import calibrate, learn_from
from llama_ft.planning.lengths import DataLengths
from llama_ft.planning.predict import combinations, predict
from llama_ft.planning.table1 import table1

SCHEMA_VERSION = 1
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def make_plan(
    config: PlanConfig,
    gpus: list[GpuConfig],
    lengths: DataLengths,
    progress: Progress,
    command: str,
    profiles: Sequence[GpuConfig] = (),
) -> dict[str, Any]:
    """The content of `plan.json`, in plain JSON types.

    Args:
        progress: shows a title and how much of a total is done.
        command: what the user typed.
        profiles: all cards that are known, for advice.

    Raises:
        UserError: if what is asked for can run nowhere.
    """
    learned = None if config.calibrate is None else learn_from(Path(config.calibrate), gpus)
    optims, asked = planned_combinations(config), config
    # No micro-batch is larger than the data.
    size = min(config.training.micro_batch_size, len(lengths.pairs))
    config = replace(config, training=replace(config.training, micro_batch_size=size))
    compared_for_advice = optims if config.goal is None else combinations(with_gc=True)
    all_rows = predict(config, compared_for_advice, gpus, lengths.pairs, partial(progress, "plan"))
    rows = [row for row in all_rows if OptimConfig(**row["optim"]) in optims]
    time = {"kind": "bound", "about": "at best: each operator at the full rate of the card's matrix units or memory"}
    if learned is not None:
        time = calibrate(all_rows, learned)
    compared = None
    if config.combinations is not Combinations.one:
        first = [row for row in rows if row["gpu"] == gpus[0].name]
        compared = table1(config, gpus[0], lengths.pairs, first, partial(progress, "table 1"))
    note = "at best" if time["kind"] == "bound" else ""
    adviser = Adviser(config, all_rows, gpus, profiles, lengths.pairs, progress, note)
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "versions": versions(),
        "model": config.model.name,
        "data": {
            "name": config.data.name,
            "about": lengths.about,
            "is_stand_in": lengths.is_stand_in,
            "samples": len(lengths.pairs),
            "longest": lengths.longest,
            "tokens": sum(length for length, _ in lengths.pairs),
        },
        "techniques": {name: _plain(asdict(getattr(config, name))) for name in ("ga", "mp", "lora", "gc")},
        "training": _plain(asdict(asked.training)),
        "gpus": [_plain(asdict(gpu)) for gpu in gpus],
        # What runtime_s is: a bound at the profile's rates, or calibrated by runs.
        "time": time,
        "rows": rows,
        "table1": compared,
        "advice": adviser.advise() if config.goal else None,
    }


def planned_combinations(config: PlanConfig) -> list[OptimConfig]:
    """The combinations that are asked for."""
    if config.combinations is Combinations.one:
        return [config.optim]
    return combinations(with_gc=config.combinations is Combinations.sixteen)


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return values.name if isinstance(values, enum.Enum) else values
