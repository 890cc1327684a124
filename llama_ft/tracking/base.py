"""Code shared by the trackers: what is tracked, and when; a tracker that fails or hangs does not stop a run."""

import shlex
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from llama_ft.config import TrackerConfig
from llama_ft.config.checks import Settings
from llama_ft.records.metrics import METRICS_FILE, Metrics
from llama_ft.records.result import CONFIG_FILE, RESULT_FILE, Result
from llama_ft.system import Log

# By their names in the tracker: W&B has its own config.yaml.
RUN_FILES = {f"resolved_{CONFIG_FILE}": CONFIG_FILE, RESULT_FILE: RESULT_FILE, METRICS_FILE: METRICS_FILE}
# Keys of the result that the config has too, or that are only for machines.
NOT_TRACKED = "schema_version optim techniques model data gpu micro_batch_size packing breakdown command".split()
SECONDS_TO_START, SECONDS_TO_STEP, SECONDS_TO_FINISH = 60, 30, 150

Table = tuple[list[str], list[list[Any]]]  # columns, and a row for each run, whose first two values name it


@dataclass(frozen=True)
class Subject:
    """A run, a sweep's table or a study."""

    name: str
    job_type: str
    folder: Path  # where the tracker puts its own files
    settings: Settings = field(default_factory=dict)
    group: str | None = None  # the sweep
    tags: Iterable[str] = ()


class Tracker:
    """The base class, which is `tracker=disabled`. A tracker that fails says so once, and then sends nothing."""

    place = ""  # where to look at the subject, for display

    def __init__(self, config: TrackerConfig, subject: Subject, log: Log) -> None:
        self._config, self._subject, self._log, self._has_failed = config, subject, log, False
        self._guard(SECONDS_TO_START, self._start)

    def step(self, metrics: Metrics) -> None:
        """Send an optimizer step of a run, or a held-out loss, which follows the step after which it was measured."""
        values = asdict(metrics)
        self._guard(SECONDS_TO_STEP, partial(self._step, values.pop("step"), values))

    def finish(self, result: Result | None) -> None:
        """End a run, with its result if there is one. Always called."""
        figures = {key: value for key, value in asdict(result).items() if key not in NOT_TRACKED} if result else {}
        files = {name: self._subject.folder / file for name, file in RUN_FILES.items()}
        self.send(figures, files, ok=result is not None and result.status == "ok")

    def send(self, figures: Settings, files: dict[str, Path], table: Table | None = None, ok: bool = True) -> None:
        """Send the final figures, the files that exist, under these names, and a sweep's table."""
        kept = {name: file for name, file in files.items() if file.is_file()}
        self._guard(SECONDS_TO_FINISH, partial(self._finish, figures, kept, table, ok))

    def _start(self) -> None: ...

    def _step(self, step: int, values: Settings) -> None: ...

    def _finish(self, figures: Settings, files: dict[str, Path], table: Table | None, ok: bool) -> None: ...

    def _stop(self) -> None: ...

    def _guard(self, seconds: float, action: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            in_time(seconds, action)
        except (Exception, SystemExit) as error:
            self._has_failed = True
            self._stop()
            kind, subject = self._config.kind.name, self._subject
            send = f"python -m llama_ft.report {shlex.quote(str(subject.folder))} tracker={kind} tracker.upload=true"
            again = f": {send} sends it" if subject.job_type in ("train", "sweep") else ""
            problem = f"tracker={kind}: {subject.name} is not tracked in full ({reason(error)})"
            self._log(f"{problem}. The local files hold everything{again}.")


def in_time(seconds: float, action: Callable[[], None]) -> None:
    """Do something; if it takes longer, raise a TimeoutError and leave it running in its thread."""
    future: Future[None] = Future()

    def act() -> None:
        try:
            action()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    Thread(target=act, daemon=True).start()
    future.result(seconds)


def reason(error: BaseException) -> str:
    """The reason of an exception in a line."""
    if isinstance(error, OSError) and error.strerror:
        file = error.filename2 or error.filename
        return f"{error.strerror}: {file}" if file else error.strerror
    return next(iter(str(error).strip().splitlines()), "it does not answer")
