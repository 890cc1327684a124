"""Weights & Biases runs: one for each run of ours. wandb is imported here and in wandb_sweep alone."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from llama_ft.config import TrackerConfig, TrackerMode

FILES = ("config.yaml", "result.json", "metrics.jsonl")
# Of the result: what the config says already, and what is for machines.
NOT_IN_SUMMARY = ("schema_version", "optim", "techniques", "model", "data", "gpu", "batch_size", "ledger", "command")
SECONDS_TO_START, SECONDS_TO_FINISH = 30, 120


def mode_of(config: TrackerConfig) -> str:
    """W&B's mode: what is asked for, else what WANDB_MODE says, else online where there is a key."""
    if config.mode is not TrackerMode.auto:
        return config.mode.name
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def has_key() -> bool:
    """Whether W&B would find an API key, in the environment or where `wandb login` puts it, without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    hosts = {urlsplit(wandb.Settings().base_url).netloc, "api.wandb.ai"}
    if own := os.environ.get("WANDB_BASE_URL"):
        hosts = {urlsplit(own).netloc}
    try:
        known = netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts
    except (OSError, NetrcParseError, UnicodeDecodeError):
        return False
    return not hosts.isdisjoint(known)


def start_run(
    config: TrackerConfig, run_dir: Path, settings: dict[str, Any], group: str | None, warn: Callable[[str], None]
) -> "WandbRun":
    """A W&B run for a run of ours, with what a dashboard filters and groups by: config, group, tags."""
    techniques = [name for name, on in settings["optim"].items() if on] or ["baseline"]
    about = {
        "project": config.project,
        "group": group,
        "job_type": "train",
        "name": run_dir.name,
        "tags": [text[:64] for text in (*techniques, settings["model"]["name"], settings["gpu"]["name"])],
        "config": settings | {"combination": "_".join(techniques)},
    }
    return WandbRun(mode_of(config), run_dir, about, warn)


class WandbRun:
    """A W&B run kept in a folder. Whatever goes wrong with it costs the tracking, never what is tracked."""

    reachable = True  # one sentence and one wait for a command, not for each of its runs

    def __init__(self, mode: str, folder: Path, about: dict[str, Any], warn: Callable[[str], None]) -> None:
        self._folder, self._warn, self._last_step = folder, warn, 0
        self._run = self._start("offline" if mode == "online" and not WandbRun.reachable else mode, about)

    def _start(self, mode: str, about: dict[str, Any]) -> Any:
        try:
            return init(mode, self._folder, about)
        except Exception as error:
            if mode == "online":
                WandbRun.reachable = False
                self._warn(
                    f"W&B cannot be reached ({reason(error)}): offline from here on; `wandb sync` sends it later"
                )
                return self._start("offline", about)
            self._run = None
            self._failed(error)
            return None

    def step(self, metrics: dict[str, Any]) -> None:
        """Log a step's numbers."""
        step = metrics["step"]
        # Committed at once: a row held back would overwrite the summary with the last step's values.
        self.do(lambda run: run.log({k: v for k, v in metrics.items() if k != "step"}, step=step, commit=True))
        self._last_step = step

    def finish(self, result: dict[str, Any] | None) -> None:
        """Store the result and the run's files, and close the run: finished if the result is ok, else failed."""
        if result is not None:
            summary = {key: value for key, value in result.items() if key not in NOT_IN_SUMMARY}
            self.do(lambda run: run.summary.update(json.loads(json.dumps(summary))))
        self.keep([self._folder / name for name in FILES])
        self.close(ok=result is not None and result["status"] == "ok")

    def keep(self, files: list[Path]) -> None:
        """Store those of the files that exist with the run."""
        for file in filter(Path.exists, files):
            self.do(partial(_save, file=file))

    def do(self, action: Callable[[Any], object]) -> None:
        """Do something with the W&B run, as long as there is one."""
        if self._run is not None:
            try:
                action(self._run)
            except Exception as error:
                self._failed(error)

    def close(self, ok: bool) -> None:
        """Close the run, and say so if not all of it has been kept."""
        files = Path(self._run.dir).parent if self._run is not None else None
        self.do(lambda run: run.finish(exit_code=0 if ok else 1))
        if self._run is None or files is None:
            return
        self._run = None
        if not files.is_relative_to(self._folder.absolute()):
            self._warn(f"W&B could not write into {self._folder / 'wandb'}: its files are in {files}")
        elif lost := first_error(files / "logs" / "debug-internal.log"):
            self._warn(f"W&B lost some of this run ({lost}). {again(self._folder)}")

    def _failed(self, error: Exception) -> None:
        run, self._run = self._run, None
        with suppress(Exception):
            run.finish(exit_code=1)
        with suppress(Exception):
            wandb.teardown()  # else what is left of a crashed service fails again at our exit, and for the next run
        since = f" after optimizer step {self._last_step}" if self._last_step else ""
        self._warn(f"W&B failed{since} and is off for the rest of this run ({reason(error)}). {again(self._folder)}")


def _save(run: Any, file: Path) -> None:
    copy = Path(run.dir) / file.name  # W&B would link to it, say so, and break when the folder is moved
    shutil.copyfile(file, copy)
    run.save(copy, base_path=run.dir, policy="now")


def init(mode: str, folder: Path, about: dict[str, Any]) -> Any:
    """`wandb.init`, asking and printing nothing.

    A folder has one W&B run, whose id its files carry: W&B replaces what it has of a run by one with the same id.
    """
    earlier = sorted(folder.glob("wandb/*run-*-*"), key=lambda files: files.name.partition("run-")[2])
    return wandb.init(
        mode=mode,  # type: ignore[arg-type]
        dir=folder,
        id=earlier[-1].name.rpartition("-")[2] if earlier else None,
        reinit="finish_previous",  # a sweep is several runs in one process
        settings=wandb.Settings(
            silent=True,
            console="off",  # what a run prints is in its train.log already
            init_timeout=SECONDS_TO_START,
            finish_timeout=SECONDS_TO_FINISH,
            finish_timeout_raises=True,
        ),
        **about,
    )


def first_error(log: Path) -> str | None:
    """What W&B's service complained of first; it goes on without telling."""
    with suppress(OSError, ValueError):
        for line in log.read_text(encoding="utf-8").splitlines():
            if '"level":"ERROR"' in line:
                message = json.loads(line)["msg"]
                return str(message)
    return None


def reason(error: Exception) -> str:
    """An exception in a line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def again(folder: Path) -> str:
    """How to send what was lost."""
    return f"The local files hold everything: python -m llama_ft.report {folder} tracker.upload=true sends it again."
