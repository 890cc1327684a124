"""Where a run's progress is reported to, behind one small interface: a run's steps, then its result.

The local files (`metrics.jsonl`, `result.json`) are the truth and are written by the run itself; what is here sends
them on, and can send them again later. Tracking that fails says so in a sentence and lets the run go on.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_ft.config import TrackerConfig, TrackerKind, TrackerMode
from llama_ft.config.checks import Settings
from llama_ft.config.techniques import combination_name
from llama_ft.tracking.base import Subject, Tracker

__all__ = ["Tracker", "start_tracker", "track_files", "track_sweep"]


def start_tracker(
    config: TrackerConfig, run_dir: Path, settings: Settings, group: str | None, log: Callable[[str], None]
) -> Tracker:
    """The tracker of a run in the sweep `group`: then `step` for each optimizer step, and in any case `finish`."""
    combination = combination_name(settings["optim"])
    techniques = [name for name, on in settings["optim"].items() if on] or [combination]
    tags = (*techniques, settings["model"]["name"], settings["gpu"]["name"])
    subject = Subject(run_dir.name, "train", run_dir, settings | {"combination": combination}, group, tags)
    return _tracker(config, subject, log)


def track_sweep(
    config: TrackerConfig,
    sweep_dir: Path,
    columns: list[str],
    rows: list[list[Any]],
    files: Sequence[str],
    log: Callable[[str], None],
) -> None:
    """Report a sweep as a whole, beside its runs: its table, and the files of its report in its folder."""
    name = sweep_dir.absolute().name
    about = {key: {"name": rows[0][columns.index(key)]} for key in ("model", "gpu")}
    subject = Subject(f"{name}: table", "sweep", sweep_dir, about, name, ("sweep",))
    _tracker(config, subject, log).send({}, {file: sweep_dir / file for file in files}, (columns, rows))


def track_files(
    config: TrackerConfig,
    name: str,
    job_type: str,
    numbers: dict[str, float],
    files: Sequence[Path],
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """Report something that is neither a run nor a sweep, such as a study; dashboards filter by `job_type`."""
    subject = Subject(name, job_type, folder, tags=(job_type,))
    _tracker(config, subject, log).send(numbers, {file.name: file for file in files})


def _tracker(config: TrackerConfig, subject: Subject, log: Callable[[str], None]) -> Tracker:
    is_off = config.mode is TrackerMode.auto and os.environ.get("WANDB_MODE") == "disabled"
    if config.kind is TrackerKind.wandb and not is_off:
        from llama_ft.tracking.wandb_run import WandbRun  # wandb takes a second to import

        return WandbRun(config, subject, log)
    if config.kind is TrackerKind.tensorboard:
        try:
            from llama_ft.tracking.tensorboard_run import TensorBoardRun

            return TensorBoardRun(config, subject, log)
        except ModuleNotFoundError:
            log("tracker=tensorboard needs a package, and nothing is tracked: pip install tensorboard")
    return Tracker(config, subject, log)
