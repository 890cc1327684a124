"""Runs that are over, sent to W&B from their local files: tracked offline, cut off from the network, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llama_ft.config import TrackerConfig, TrackerMode, UploadConfig, UserError
from llama_ft.records.metrics import read_metrics
from llama_ft.records.result import CONFIG_FILE, read_result


def upload_runs(config: UploadConfig, run_dirs: list[Path], sweep: str | None, log: Callable[[str], None]) -> str:
    """Send each run as if it took place now. W&B replaces what it has of it.

    Args:
        sweep: the name to group the runs by; None for a run by itself.

    Returns:
        The W&B project of the last run.

    Raises:
        UserError: if there is no key to send them with, a file is damaged, or W&B fails; the runs after that one are
            not sent.
    """
    if config.mode is TrackerMode.disabled:
        raise UserError("tracker.upload=true with tracker.mode=disabled sends nothing: leave one of them out")
    from llama_ft.tracking.wandb_run import mode_of

    if config.mode is TrackerMode.auto and mode_of(TrackerConfig(config.mode)) != "online":
        asked = os.environ.get("WANDB_MODE")
        why = f"WANDB_MODE={asked} keeps it" if asked else "without an API key, which `wandb login` keeps, it is"
        raise UserError(f"W&B gets nothing, {why} offline; tracker.mode=offline rebuilds the runs for `wandb sync`")
    project = config.project or TrackerConfig().project
    for run_dir in run_dirs:
        if not (run_dir / CONFIG_FILE).exists():  # it was refused before it began
            log(f"{run_dir.name}: no {CONFIG_FILE}, not sent")
            continue
        settings = read_settings(run_dir / CONFIG_FILE)
        project = config.project or str(settings["tracker"]["project"])
        log(f"{run_dir.name}: {_send(TrackerConfig(config.mode, project), run_dir, settings, sweep)}")
    return project


def _send(config: TrackerConfig, run_dir: Path, settings: dict[str, Any], sweep: str | None) -> str:
    """Send a run, and say where it is."""
    from llama_ft.tracking.wandb_run import start_run

    problems: list[str] = []
    run = start_run(config, run_dir, settings, sweep or sweep_of(run_dir), problems.append, may_go_offline=False)
    for metrics in read_metrics(run_dir):
        run.step(metrics)
    place = run.place
    run.finish(read_result(run_dir))
    if problems:
        raise UserError(problems[0])
    return place


def sweep_of(run_dir: Path) -> str | None:
    """The name of the sweep that a run is a row of, if its report lies beside it."""
    parent = run_dir.absolute().parent
    return parent.name if (parent / "table2.csv").exists() else None


def read_settings(file: Path) -> dict[str, Any]:
    """A run's resolved config.

    Raises:
        UserError: naming the file, if it is not one.
    """
    try:
        settings = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # of the disk, of the encoding, or of the YAML parser's many
        raise UserError(f"{file} cannot be read: {error}") from error
    sections = ("optim", "model", "gpu", "tracker")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(section), dict) for section in sections):
        raise UserError(f"{file} is not the config of a run")
    return {str(key): value for key, value in settings.items()}
