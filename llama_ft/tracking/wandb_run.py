"""Weights & Biases: a W&B run for each of our runs, and one for a sweep's table. Only this module imports wandb."""

import logging
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb

from llama_ft.config import TrackerConfig, TrackerMode
from llama_ft.config.checks import Settings
from llama_ft.files import TRAINED_FILES
from llama_ft.system import Log
from llama_ft.tracking.base import Subject, Table, Tracker, in_time, reason

CHARTS = {"peak_memory_mib": "Peak memory, MiB", "runtime_s": "Runtime, s", "tokens_per_s": "Tokens/s"}
SECONDS_TO_CONNECT, SECONDS_TO_UPLOAD, SECONDS_TO_STOP = 20, 120, 5


class WandbRun(Tracker):
    """A W&B run, in place of an earlier one of the same folder."""

    def _start(self) -> None:
        self._run = run = init(self._config, self._subject, self._log)
        self._holds_a_row = False
        self.place = run.url or f"`wandb sync {Path(run.dir).parent}` sends it"

    def _step(self, step: int, values: Settings) -> None:
        # Held back until the next step, since a held-out loss of the same row may follow.
        self._run.log(values, step=step, commit=False)
        self._holds_a_row = True

    def _finish(self, figures: Settings, files: dict[str, Path], table: Table | None, ok: bool) -> None:
        run, pictures = self._run, [file for file in files.values() if file.suffix == ".png"]
        media = {f"pictures/{file.stem}": wandb.Image(str(file)) for file in pictures}
        media |= charts(*table) if table else {}
        if media or self._holds_a_row:  # a row that is held back would later overwrite the summary
            run.log(media, commit=True)
        run.summary.update(figures)
        if "device" in figures:
            run.config.update({"device": figures["device"]})  # the one that gpu=auto chose
        for name, file in files.items():
            copy = Path(run.dir) / name  # W&B would print that it links to it, and break when the folder is moved
            shutil.copyfile(file, copy)
            run.save(copy, base_path=run.dir, policy="now")
        if self._config.artifacts:
            self._log_artifact()
        run.finish(exit_code=0 if ok else 1)
        stop()

    def _log_artifact(self) -> None:
        """Log the adapter or weights in the run's folder, as the artifact `NAME-trained` of type `model`."""
        trained = [file for name in TRAINED_FILES if (file := self._subject.folder / name).is_file()]
        if trained:
            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", f"{self._subject.name}-trained"), type="model")
            for file in trained:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)

    def _stop(self) -> None:
        stop()


def init(config: TrackerConfig, subject: Subject, log: Log) -> Any:
    """`wandb.init` without questions and output. Keys not given come from the environment or W&B's settings."""
    settings = session(config.mode)
    # A name or an id in the environment is meant for one run: a sweep's runs, or studies, would replace each other.
    is_alone = subject.group is None and subject.job_type == "train"
    name, run_id = (settings.run_name, settings.run_id) if is_alone else (None, None)
    about: dict[str, Any] = {
        "dir": subject.folder,
        "project": config.project or settings.project or "llama_ft",
        "entity": config.entity,
        "group": config.group or settings.run_group or subject.group,
        "job_type": subject.job_type,
        "name": name or subject.name,
        "id": run_id or earlier_id(subject.folder) or secrets.token_hex(4),
        "tags": [tag[:64] for tag in (*subject.tags, *(config.tags or settings.run_tags or ()))],
        "notes": config.notes,
        "config": subject.settings,
        "reinit": "create_new",  # whatever happened to the previous run
    }
    if settings.mode == "online":
        try:
            if wandb.login(prompt=False, verify=False):
                return init_online(about)
            if config.mode is TrackerMode.online:
                raise wandb.errors.UsageError("there is no API key: `wandb login` stores one")
        except wandb.Error as error:
            if config.mode is TrackerMode.online:
                raise
            log(f"W&B cannot be used online ({reason(error)}): offline from now on; `wandb sync` sends the runs")
            os.environ["WANDB_MODE"] = "offline"  # the next run need not wait for the network again
            stop()  # the service would keep the id from being used again
        session(TrackerMode.offline)
    return wandb.init(**about)


def init_online(about: dict[str, Any]) -> Any:
    """`wandb.init`; a run that was deleted from W&B becomes a new one, since its id cannot be used again."""
    try:
        return wandb.init(**about)
    except wandb.errors.CommError as error:
        if "deleted" not in str(error):
            raise
        return wandb.init(**about | {"id": secrets.token_hex(4)})


def session(mode: TrackerMode) -> wandb.Settings:
    """W&B's settings in this process: the user's, but W&B prints nothing and sends no error reports."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    logging.raiseExceptions = False  # else W&B's own log prints tracebacks if the disk is full
    settings = wandb.Settings(
        silent=True,
        console="off",  # what a run prints is in its train.log already
        init_timeout=SECONDS_TO_CONNECT,
        finish_timeout=SECONDS_TO_UPLOAD,
        finish_timeout_raises=True,
    )
    if mode is not TrackerMode.auto:
        settings.mode = "online" if mode is TrackerMode.online else "offline"
    return wandb.setup(settings).settings


def stop() -> None:
    """Stop W&B's service: a crashed or hanging one would delay our exit and the next run."""
    with suppress(Exception, SystemExit):
        in_time(SECONDS_TO_STOP, wandb.teardown)


def earlier_id(folder: Path) -> str | None:
    """The id of the folder's last W&B run. W&B replaces a run by a new one with the same id."""
    files = sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.parent.name.partition("run-")[2])
    return files[-1].stem.removeprefix("run-") if files else None


def charts(columns: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    """A sweep's table, and a bar chart for each of its main figures."""
    media: dict[str, Any] = {"table2": wandb.Table(columns=list[str | int](columns), data=rows)}
    for key, title in CHARTS.items():
        values = [(" ".join(filter(None, row[:2])), row[columns.index(key)]) for row in rows]
        bars = wandb.Table(columns=["run", key], data=[[run, value] for run, value in values if value is not None])
        media[f"charts/{key}"] = wandb.plot.bar(bars, "run", key, title=title)
    return media
