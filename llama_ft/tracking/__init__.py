"""Where a run's progress is reported to, behind one small interface: a run's steps, then its result.

The local files (`metrics.jsonl`, `result.json`) are the truth and are written by the run itself; what is here sends
them on, and can send them again later. Tracking that fails says so in a sentence and lets the run go on.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from llama_ft.config import TrackerConfig, TrackerMode


class Tracker(Protocol):
    """Receives a run."""

    def step(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        ...

    def finish(self, result: dict[str, Any] | None) -> None:
        """The end of the run, with its result; None if there is none. Always called."""
        ...


class NoTracker:
    """Tracking switched off."""

    def step(self, metrics: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self, result: dict[str, Any] | None) -> None:
        """Nothing."""


def start_tracker(
    config: TrackerConfig, run_dir: Path, settings: dict[str, Any], group: str | None, warn: Callable[[str], None]
) -> Tracker:
    """The tracker that the config asks for.

    Args:
        settings: the run's resolved config, stored with the run.
        group: name of the sweep that the run belongs to.
        warn: told, in a sentence, when tracking fails.
    """
    if config.mode is TrackerMode.disabled:
        return NoTracker()
    from llama_ft.tracking.wandb_run import start_run  # wandb takes a second to import

    return start_run(config, run_dir, settings, group, warn)


def track_sweep(
    config: TrackerConfig,
    sweep_dir: Path,
    columns: list[str],
    rows: list[list[Any]],
    files: Sequence[str],
    warn: Callable[[str], None],
) -> None:
    """Report a sweep as a whole, beside its runs.

    Args:
        rows: one for each run, a value for each column; the first two name the run.
        files: of the report, in the sweep's folder.
    """
    if config.mode is not TrackerMode.disabled:
        from llama_ft.tracking.wandb_sweep import send_sweep

        send_sweep(config, sweep_dir, columns, rows, [sweep_dir / name for name in files], warn)
