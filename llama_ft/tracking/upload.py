"""Runs that are over, sent to W&B from their local files: tracked offline, cut off from the network, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from llama_ft.config import TrackerConfig, TrackerMode, UserError
from llama_ft.measure.result import CONFIG_FILE, METRICS_FILE, read_result
from llama_ft.tracking import start_tracker


def upload_runs(config: TrackerConfig, run_dirs: list[Path], sweep: str | None, say: Callable[[str], None]) -> None:
    """Send each run as if it took place now. W&B replaces what it has of it.

    Args:
        sweep: the name to group the runs by; None for a run by itself.

    Raises:
        UserError: if there is no key to send them with, or tracking fails.
    """
    if config.mode is TrackerMode.disabled:
        raise UserError("tracker.upload=true with tracker.mode=disabled sends nothing: leave one of them out")
    from llama_ft.tracking.wandb_run import mode_of

    if config.mode is TrackerMode.auto and mode_of(config) != "online":
        raise UserError(
            "W&B has no API key here: run `wandb login`, or give tracker.mode=offline to rebuild the runs"
            " for `wandb sync`"
        )
    for run_dir in run_dirs:
        if not (run_dir / CONFIG_FILE).exists():  # it was refused before it began
            say(f"{run_dir.name}: no {CONFIG_FILE}, not sent")
            continue
        problems: list[str] = []
        settings = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG_FILE))
        assert isinstance(settings, dict)
        tracker = start_tracker(config, run_dir, {str(k): v for k, v in settings.items()}, sweep, problems.append)
        metrics = run_dir / METRICS_FILE
        for line in metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []:
            tracker.step(json.loads(line))
        tracker.finish(read_result(run_dir))
        if problems:
            raise UserError(f"{run_dir}: {problems[0]}")
        say(f"{run_dir.name}: sent")
