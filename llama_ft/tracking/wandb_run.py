"""Weights & Biases runs: one for each run of ours. wandb is imported here and in wandb_sweep alone."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from llama_ft.config import TrackerConfig, TrackerMode
from llama_ft.records.metrics import METRICS_FILE
from llama_ft.records.result import CONFIG_FILE, RESULT_FILE

# By their names in W&B, which keeps a config.yaml of its own.
FILES = {f"resolved_{CONFIG_FILE}": CONFIG_FILE, RESULT_FILE: RESULT_FILE, METRICS_FILE: METRICS_FILE}
# Of the result: what the config says already, and what is for machines.
NOT_IN_SUMMARY = (
    "schema_version",
    "optim",
    "techniques",
    "model",
    "data",
    "gpu",
    "micro_batch_size",
    "breakdown",
    "command",
)
SECONDS_TO_START, SECONDS_TO_FINISH, SECONDS_TO_STOP = 30, 120, 15


def session() -> wandb.Settings:
    """W&B's settings in this process, in which it prints nothing, and reports nothing to its makers."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    logging.raiseExceptions = False  # of W&B's own log where the disk is full, as tracebacks on the terminal
    settings = wandb.Settings(
        silent=True,
        console="off",  # what a run prints is in its train.log already
        init_timeout=SECONDS_TO_START,
        finish_timeout=SECONDS_TO_FINISH,
        finish_timeout_raises=True,
    )
    return wandb.setup(settings).settings


def end_session() -> None:
    """Stop W&B's service. One that has crashed would fail again at our exit, and for the next run."""
    with suppress(Exception, SystemExit):
        within(SECONDS_TO_STOP, wandb.teardown)
    with suppress(Exception, SystemExit):
        wandb.teardown()  # of a service that was killed: forgets it


def within(seconds: float, action: Callable[[], object]) -> None:
    """Do something that waits for W&B's service; kill a service that does not answer in time.

    Raises:
        TimeoutError: if it had to be killed; else whatever the action raises.
    """
    errors: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        for service in children("wandb-core"):
            with suppress(ProcessLookupError):
                os.kill(service, signal.SIGKILL)
        thread.join(SECONDS_TO_STOP)
        raise TimeoutError(f"its service did not answer for {seconds:g} s")
    if errors:
        raise errors[0]


def children(name: str) -> list[int]:
    """Living processes that this one has started, by the name of their program; none where the system does not tell."""
    found = []
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for pid in file.read_text().split():
                _, program, rest = re.split(r"\((.*)\)", Path(f"/proc/{pid}/stat").read_text(), maxsplit=1)
                if program == name and not rest.startswith(" Z"):
                    found.append(int(pid))
    return found


def mode_of(config: TrackerConfig) -> str:
    """W&B's mode: what is asked for, else what WANDB_MODE says, else online where there is a key."""
    if config.mode is not TrackerMode.auto:
        return config.mode.name
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def has_key() -> bool:
    """Whether W&B would find an API key, in the environment or where `wandb login` puts it, without asking for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        known = netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).hosts
    except (OSError, NetrcParseError, UnicodeDecodeError):
        return False
    server = session().base_url
    default = server == wandb.Settings().base_url
    return urlsplit(server).netloc in known or (default and "api.wandb.ai" in known)  # its name of old


def start_run(
    config: TrackerConfig,
    run_dir: Path,
    settings: dict[str, Any],
    group: str | None,
    warn: Callable[[str], None],
    may_go_offline: bool = True,
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
    return WandbRun(config, run_dir, about, warn, may_go_offline)


class WandbRun:
    """A W&B run kept in a folder. Whatever goes wrong with it costs the tracking, never what is tracked."""

    reachable = True  # one sentence and one wait for a command, not for each of its runs

    def __init__(
        self,
        config: TrackerConfig,
        folder: Path,
        about: dict[str, Any],
        warn: Callable[[str], None],
        may_go_offline: bool = True,
    ) -> None:
        self._folder, self._warn = folder, warn
        self._sweep_dir = next((place for place in (folder, *folder.parents) if place.name == about["group"]), folder)
        self._run: Any = None
        self._at = "the start"  # of the run, for who asks where it failed
        try:
            mode = mode_of(config)
            self._run = None if mode == "disabled" else self._start(mode, about, may_go_offline)
        except Exception as error:
            self._failed(error)
        self._at = "the end"

    @property
    def place(self) -> str:
        """The run's page; of an offline one, how to send it."""
        return "" if self._run is None else self._run.url or f"`wandb sync {Path(self._run.dir).parent}` sends it"

    def _start(self, mode: str, about: dict[str, Any], may_go_offline: bool) -> Any:
        if mode != "online":
            return init(mode, self._folder, about)
        try:
            if WandbRun.reachable:
                return self._start_online(about)
        except Exception as error:
            if not may_go_offline or getattr(error, "filename", None):  # of a file it is not the network's fault
                raise
            WandbRun.reachable = False
            end_session()  # which would keep the id from being used again
            self._warn(f"W&B cannot be used online ({reason(error)}): offline from here on. {self._again()}")
        return init("offline", self._folder, about)

    def _start_online(self, about: dict[str, Any]) -> Any:
        try:
            return init("online", self._folder, about)
        except Exception as error:
            if "deleted" not in str(error):
                raise
            end_session()
            return init("online", self._folder, about | {"id": None})  # a deleted run's id is never taken again

    def step(self, metrics: dict[str, Any]) -> None:
        """Log a step's numbers."""
        step = metrics["step"]
        self._at = f"optimizer step {step}"
        # Committed at once: a row held back would overwrite the summary with the last step's values.
        self.do(lambda run: run.log({k: v for k, v in metrics.items() if k != "step"}, step=step, commit=True))
        self._at = "the end"

    def finish(self, result: dict[str, Any] | None) -> None:
        """Store the result and the run's files, and close the run: finished if the result is ok, else failed."""
        if result is not None:
            summary = {key: value for key, value in result.items() if key not in NOT_IN_SUMMARY}
            self.do(lambda run: run.summary.update(summary))
            self.do(lambda run: run.config.update({"device": result.get("device")}))  # what gpu=auto has turned out as
        self.keep({name: self._folder / file for name, file in FILES.items()})
        self.close(ok=result is not None and result["status"] == "ok")

    def keep(self, files: Mapping[str, Path]) -> None:
        """Store those of the files that exist with the run, under their names."""
        for name, file in files.items():
            if file.exists():
                self.do(partial(_save, name=name, file=file))

    def do(self, action: Callable[[Any], object]) -> None:
        """Do something with the W&B run, as long as there is one."""
        if self._run is not None:
            try:
                action(self._run)
            except Exception as error:
                self._failed(error)

    def close(self, ok: bool) -> None:
        """Close the run, and say so if not all of it has been kept."""
        log = Path(self._run.dir).parent / "logs" / "debug-internal.log" if self._run is not None else None
        self.do(lambda run: within(SECONDS_TO_FINISH + SECONDS_TO_STOP, lambda: run.finish(exit_code=0 if ok else 1)))
        end_session()
        if self._run is not None and log is not None and (lost := first_error(log)):
            self._lost(lost, "only part of it")
        self._run = None

    def _failed(self, error: Exception) -> None:
        run, self._run = self._run, None
        if run is not None:
            with suppress(Exception):
                within(SECONDS_TO_STOP, lambda: run.finish(exit_code=1))
        end_session()
        self._lost(reason(error), "nothing of it" if run is None else "only part of it")

    def _lost(self, why: str, has: str) -> None:
        name = self._folder.absolute().name
        self._warn(f"W&B failed at {self._at} of {name} ({why}) and has {has}. {self._again()}")

    def _again(self) -> str:
        folder = shlex.quote(str(self._sweep_dir))
        return f"The local files hold everything: python -m llama_ft.report {folder} tracker.upload=true sends it."


def _save(run: Any, name: str, file: Path) -> None:
    copy = Path(run.dir) / name  # W&B would link to it, say so, and break when the folder is moved
    shutil.copyfile(file, copy)
    run.save(copy, base_path=run.dir, policy="now")


def init(mode: str, folder: Path, about: dict[str, Any]) -> Any:
    """`wandb.init`, asking and printing nothing.

    Raises:
        Exception: of wandb's, if it cannot start, or of no key, which wandb would ask for.
    """
    session()
    if mode == "online" and not has_key():
        raise wandb.errors.UsageError("there is no API key: `wandb login` keeps one")
    # A sweep is several runs in one process.
    about = {"id": earlier_id(folder), "reinit": "finish_previous"} | about
    return wandb.init(mode=mode, dir=folder, **about)  # type: ignore[arg-type]


def earlier_id(folder: Path) -> str | None:
    """The id of the folder's last W&B run. W&B replaces what it has of a run by one with the same id."""
    files = sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.parent.name.partition("run-")[2])
    return files[-1].stem.removeprefix("run-") if files else None


def first_error(log: Path) -> str | None:
    """What W&B's service complained of first, if it lost anything; it goes on without telling."""
    with suppress(OSError, ValueError):
        for line in log.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if str(entry["level"]).startswith("ERROR"):
                return ": ".join(str(entry[key]) for key in ("msg", "error", "status") if key in entry)
    return None


def reason(error: Exception) -> str:
    """An exception in a line."""
    if isinstance(error, OSError) and error.strerror:
        place = error.filename2 or error.filename
        return f"{error.strerror}: {place}" if place else error.strerror
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
