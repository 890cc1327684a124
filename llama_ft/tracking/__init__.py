"""Where a run's progress is reported to, behind one small interface: a run's steps, then its result.

The local files (`metrics.jsonl`, `result.json`) are the truth and are written by the run itself; what is here sends
them on. A tracker that fails says so once and lets the run go on.
"""

import os
from collections.abc import Callable
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
    from llama_ft.tracking.wandb_run import WandbRun  # wandb takes a second to import

    mode = config.mode.name
    if config.mode is TrackerMode.auto:
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    return WandbRun(config.project, mode, run_dir, settings, group, warn)


def has_wandb_key() -> bool:
    """Whether W&B would find an API key, in the environment or where `wandb login` puts it, without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return "api.wandb.ai" in netrc.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
