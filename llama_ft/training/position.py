"""How far a run has come, and where its checkpoints lie. Knows nothing of torch, so that any process can look."""

import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llama_ft.config import UserError
from llama_ft.config.checks import Settings

CHECKPOINTS_DIR = "checkpoints"
STATE_FILE = "state.json"
N_KEPT = 2


@dataclass
class Position:
    """What a run has done so far."""

    epoch: int = 0  # epochs finished
    window: int = 0  # optimizer steps done in the epoch that has begun
    step: int = 0  # optimizer steps done in all
    seconds: float = 0.0  # of training
    train_loss_before: float | None = None  # measured before the first step


@dataclass(frozen=True)
class SavedState:
    """What `state.json` of a checkpoint holds: all of the run's state but tensors."""

    config_hash: str
    position: Position
    schedule: Settings = field(default_factory=dict)
    scaler: Settings = field(default_factory=dict)
    rng: dict[str, str] = field(default_factory=dict)  # states of the random generators by device, in hex


def read_state(folder: Path, config_hash: str) -> SavedState:
    """The state of a checkpoint.

    Raises:
        UserError: if the file cannot be read, or is of a run with another config.
    """
    file = folder / STATE_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        state = SavedState(**values | {"position": Position(**values["position"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged or missing: delete its folder to use the checkpoint before it") from error
    if state.config_hash != config_hash:
        raise UserError(
            f"{folder} is of a run with another configuration: give its settings again, or name another folder"
        )
    return state


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, the newest last. What an interrupted write left behind is none of them."""
    folders = (run_dir / CHECKPOINTS_DIR).glob("step_*")
    return sorted(folder for folder in folders if re.fullmatch(r"step_\d{8,}", folder.name))


def remove_older(run_dir: Path, n_kept: int = N_KEPT) -> None:
    """Remove all but the newest checkpoints, and what interrupted writes left behind."""
    found = checkpoints(run_dir)
    for folder in found[: max(0, len(found) - n_kept)]:
        folder.rename(folder.with_name(f".{folder.name}.tmp"))  # at no time is a checkpoint there in part
    for leftover in (run_dir / CHECKPOINTS_DIR).glob(".step_*.tmp"):
        shutil.rmtree(leftover)
    if not n_kept:
        with suppress(OSError):  # not there, or not empty: what others put there stays
            (run_dir / CHECKPOINTS_DIR).rmdir()
