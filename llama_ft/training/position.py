"""A run's progress, and the places of its checkpoints. Does not import torch, so that any process can look."""

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llama_ft.config import UserError
from llama_ft.config.checks import Settings
from llama_ft.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, WEIGHTS_FILE, explained
from llama_ft.records import read_record

CHECKPOINTS_DIR = "checkpoints"
STATE_FILE, OPTIMIZER_FILE = "state.json", "optimizer.safetensors"
SAVED_FILES = {STATE_FILE, OPTIMIZER_FILE, WEIGHTS_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE}
N_KEPT = 2


@dataclass
class Position:
    """A run's progress."""

    epoch: int = 0  # epochs finished
    window: int = 0  # optimizer steps done in the current epoch
    step: int = 0  # optimizer steps done in all
    seconds: float = 0.0  # of training
    train_loss_before: float | None = None  # measured before the first step


@dataclass(frozen=True)
class SavedState:
    """A checkpoint's `state.json`: all of the run's state except tensors."""

    config_hash: str
    position: Position
    run_hash: str | None = None  # of the settings that stay when a run is trained longer; None in earlier versions
    scaler: Settings = field(default_factory=dict)
    rng: dict[str, str] = field(default_factory=dict)  # states of the random generators by device, in hex


def read_state(folder: Path) -> SavedState:
    """Read a checkpoint's state; a UserError if the folder has none, or has files that no run saved."""
    check_plain(folder)
    state = read_record(SavedState, folder / STATE_FILE)
    check_plain(folder, is_known=folder.name == f"step_{state.position.step:08}")
    return state


def check_plain(folder: Path, is_known: bool = True) -> None:
    """Raise a UserError if a run did not save the folder, or did not save everything in it."""
    if not is_known or not _is_plain(folder):
        raise UserError(f"{folder} is not one of the run's checkpoints, or is damaged: move it elsewhere")


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders named like the run's checkpoints, newest last; a UserError if their folder is a link or unreadable."""
    return [path for path in _entries(run_dir) if re.fullmatch(r"step_\d{8,}", path.name)]


def best_weights(run_dir: Path) -> list[Path]:
    """The weights that were the best on held-out data at some point, newest last."""
    return [path for path in _entries(run_dir) if re.fullmatch(r"best_\d{8,}", path.name)]


def step_of(folder: Path) -> int:
    """The optimizer step in the name of a checkpoint, or of best weights."""
    return int(folder.name.rpartition("_")[2])


def _entries(run_dir: Path) -> list[Path]:
    folder = run_dir / CHECKPOINTS_DIR
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which no run creates: remove it, or name another folder for the run")
    with explained(f"{folder} cannot be read"), suppress(FileNotFoundError):
        return sorted(folder.iterdir())
    return []


def _is_plain(folder: Path) -> bool:
    """Return True for a folder, not a link to one, that contains only files saved by a run."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()} - SAVED_FILES
    return all(re.fullmatch(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", name) for name in names)


def remove_older(run_dir: Path, n_kept: int = N_KEPT, step: int | None = None) -> None:
    """Remove all but the newest checkpoints, and the remains of interrupted writes.

    Best weights are kept if they were the best at one of these checkpoints, or are now, at the run's `step`.
    """
    found = [folder for folder in checkpoints(run_dir) if _is_plain(folder)]
    kept, dropped = found[len(found) - n_kept :] if n_kept else [], found[: max(0, len(found) - n_kept)]
    at = [*map(step_of, kept), *(() if step is None else (step,))]
    best = best_weights(run_dir)
    best_kept = {path for last in at for path in [each for each in best if step_of(each) <= last][-1:]}
    dropped += [path for path in best if _is_plain(path) and path not in best_kept]
    for folder in dropped:
        folder.rename(folder.with_name(f".{folder.name}.tmp"))  # so that no partial checkpoint is ever visible
    for path in _entries(run_dir):
        if re.fullmatch(r"\.(step|best)_\d{8,}(\.\d+)?\.tmp", path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    if not n_kept:
        with suppress(OSError):  # missing, or not empty: other files stay
            (run_dir / CHECKPOINTS_DIR).rmdir()
