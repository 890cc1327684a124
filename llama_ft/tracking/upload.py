"""Runs that are over, sent to the tracker from their local files: tracked elsewhere, in part, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from llama_ft.config import TrackerConfig, TrackerKind, TrackerMode, UploadConfig, UserError
from llama_ft.config.train import read_config
from llama_ft.records.metrics import read_metrics
from llama_ft.records.result import CONFIG_FILE, read_result
from llama_ft.tracking import start_tracker


def upload_runs(
    config: UploadConfig, run_dirs: list[Path], sweep: str | None, log: Callable[[str], None]
) -> TrackerConfig:
    """Send each run as if it took place now, in place of what the tracker has of it. Returns the last run's tracker.

    Args:
        sweep: the name to group the runs by; None for a run by itself.

    Raises:
        UserError: if a file is damaged, or the tracker fails; the runs after that one are not sent.
    """
    tracker_config, problems = _sending(config), list[str]()
    for run_dir in run_dirs:
        if not (run_dir / CONFIG_FILE).exists():  # it was refused before it began
            log(f"{run_dir.name}: no {CONFIG_FILE}, not sent")
            continue
        run = read_config(run_dir / CONFIG_FILE)
        for key in ("project", "entity", "group", "tags", "notes"):
            setattr(tracker_config, key, getattr(config, key) or getattr(run.tracker, key))
        group = sweep or (run_dir.parent.name if (run_dir.parent / "table2.csv").exists() else None)
        tracker = start_tracker(tracker_config, run_dir, run.to_dict(), group, problems.append)
        for metrics in read_metrics(run_dir):
            tracker.step(metrics)
        tracker.finish(read_result(run_dir))
        if problems:
            raise UserError(problems[0])
        log(f"{run_dir.name}: {tracker.place}")
    return tracker_config


def _sending(config: UploadConfig) -> TrackerConfig:
    """A tracker that does send something: W&B online, unless offline is asked for."""
    if config.kind is TrackerKind.disabled:
        raise UserError("tracker.upload=true with tracker=disabled sends nothing: leave one of them out")
    mode = os.environ.get("WANDB_MODE", "online")
    if config.kind is TrackerKind.wandb and config.mode is TrackerMode.auto and mode != "online":
        raise UserError(f"W&B gets nothing, WANDB_MODE={mode} keeps it from it; tracker.mode=online sends the runs")
    return TrackerConfig(config.kind, TrackerMode.online if config.mode is TrackerMode.auto else config.mode)
