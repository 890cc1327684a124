"""Trackers that runs, sweeps and studies are reported to, from the local files, which can be sent again later."""

import os
from collections.abc import Sequence
from pathlib import Path

from llama_ft.config import TrackerConfig, TrackerKind, TrackerMode, UserError, read_config
from llama_ft.config.checks import Settings
from llama_ft.config.groups import UploadConfig
from llama_ft.config.techniques import combination_name
from llama_ft.records.metrics import read_metrics
from llama_ft.records.result import CONFIG_FILE, read_result
from llama_ft.system import Log
from llama_ft.tracking.base import Subject, Table, Tracker


def start_tracker(config: TrackerConfig, run_dir: Path, settings: Settings, group: str | None, log: Log) -> Tracker:
    """The tracker of a run in the sweep `group`: call `step` for each optimizer step, and always `finish`."""
    combination = combination_name(settings["optim"])
    techniques = [name for name, on in settings["optim"].items() if on] or [combination]
    tags = (*techniques, settings["model"]["name"], settings["gpu"]["name"])
    subject = Subject(run_dir.name, "train", run_dir, settings | {"combination": combination}, group, tags)
    return _tracker(config, subject, log)


def track_sweep(config: TrackerConfig, sweep_dir: Path, table: Table, files: Sequence[str], log: Log) -> None:
    """Report a sweep as a whole, in addition to its runs: its table, and the report's files in its folder."""
    name, (columns, rows) = sweep_dir.absolute().name, table
    about = {key: {"name": rows[0][columns.index(key)]} for key in ("model", "gpu")}
    subject = Subject(f"{name}: table", "sweep", sweep_dir, about, name, ("sweep",))
    _tracker(config, subject, log).send({}, {file: sweep_dir / file for file in files}, table)


def track_study(config: TrackerConfig, name: str, numbers: dict[str, float], files: Sequence[Path], log: Log) -> None:
    """Report a study: its numbers, and its files, next to which the tracker puts its own."""
    subject = Subject(name, "study", files[0].parent, tags=("study",))
    _tracker(config, subject, log).send(numbers, {file.name: file for file in files})


def upload_runs(config: UploadConfig, run_dirs: list[Path], sweep: str | None, log: Log) -> TrackerConfig:
    """Send each run as if it took place now, replacing what the tracker has of it; return the last run's config.

    The name of a `sweep` groups them. A UserError if nothing would be sent, a file is damaged, or the tracker fails.
    """
    if config.kind is TrackerKind.disabled:
        raise UserError("tracker.upload=true with tracker=disabled sends nothing: leave one of them out")
    mode, is_auto = os.environ.get("WANDB_MODE", "online"), config.mode is TrackerMode.auto
    if config.kind is TrackerKind.wandb and is_auto and mode != "online":
        raise UserError(f"WANDB_MODE={mode} keeps W&B from getting anything; tracker.mode=online sends the runs")
    tracker_config = tracker_of(config, run_dirs[0])
    problems: list[str] = []
    for run_dir in run_dirs:
        if not (run_dir / CONFIG_FILE).exists():  # the run was refused before it began
            log(f"{run_dir.name}: no {CONFIG_FILE}, not sent")
            continue
        run, tracker_config = read_config(run_dir / CONFIG_FILE), tracker_of(config, run_dir)
        group = sweep or (run_dir.parent.name if (run_dir.parent / "table2.csv").exists() else None)
        tracker = start_tracker(tracker_config, run_dir, run.to_dict(), group, problems.append)
        for metrics in read_metrics(run_dir):
            tracker.step(metrics)
        tracker.finish(read_result(run_dir))
        if problems:
            raise UserError(problems[0])
        log(f"{run_dir.name}: {tracker.place}")
    return tracker_config


def tracker_of(config: UploadConfig, run_dir: Path) -> TrackerConfig:
    """The tracker for a finished run, online unless a mode is given; keys not given are from the run's own config."""
    mode = TrackerMode.online if config.mode is TrackerMode.auto else config.mode
    own = read_config(run_dir / CONFIG_FILE).tracker if (run_dir / CONFIG_FILE).exists() else config
    keys = ("project", "entity", "group", "tags", "notes", "artifacts")
    return TrackerConfig(config.kind, mode, **{key: getattr(config, key) or getattr(own, key) for key in keys})


def _tracker(config: TrackerConfig, subject: Subject, log: Log) -> Tracker:
    is_off = config.mode is TrackerMode.auto and os.environ.get("WANDB_MODE") == "disabled"
    if config.kind is TrackerKind.wandb and not is_off:
        from llama_ft.tracking.wandb_run import WandbRun  # wandb takes a second to import

        return WandbRun(config, subject, log)
    if config.kind is TrackerKind.tensorboard:
        try:
            from llama_ft.tracking.tensorboard_run import TensorBoardRun

            return TensorBoardRun(config, subject, log)
        except ModuleNotFoundError:
            log("tracker=tensorboard needs a package, so nothing is tracked: pip install tensorboard")
    return Tracker(config, subject, log)
