"""How far a run has come, and where its checkpoints lie. Knows nothing of torch, so that any process can look."""

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
    run_hash: str | None = None  # of all that stays when a run is trained longer; None in those of earlier versions
    scaler: Settings = field(default_factory=dict)
    rng: dict[str, str] = field(default_factory=dict)  # states of the random generators by device, in hex


def read_state(folder: Path) -> SavedState:
    """The state of a checkpoint; a UserError if the folder holds none, or something that no run saved."""
    check_plain(folder)
    state = read_record(SavedState, folder / STATE_FILE)
    check_plain(folder, is_known=folder.name == f"step_{state.position.step:08}")
    return state


def check_plain(folder: Path, is_known: bool = True) -> None:
    """Raise a UserError if the folder is none that a run saved, or holds something else too."""
    if not is_known or not _is_plain(folder):
        raise UserError(f"{folder} is none of the run's checkpoints, or damaged: move it elsewhere")


def checkpoints(run_dir: Path) -> list[Path]:
    """What looks like the run's checkpoints, the newest last; a UserError if their folder is a link, or unreadable."""
    return [path for path in _entries(run_dir) if re.fullmatch(r"step_\d{8,}", path.name)]


def best_weights(run_dir: Path) -> list[Path]:
    """The weights that were at some time the best on held-out data, the newest last."""
    return [path for path in _entries(run_dir) if re.fullmatch(r"best_\d{8,}", path.name)]


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint, or of the best weights, by its name."""
    return int(folder.name.rpartition("_")[2])


def _entries(run_dir: Path) -> list[Path]:
    folder = run_dir / CHECKPOINTS_DIR
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, and no run makes one: remove it, or name another folder for the run")
    with explained(f"{folder} cannot be read"), suppress(FileNotFoundError):
        return sorted(folder.iterdir())
    return []


def _is_plain(folder: Path) -> bool:
    """Whether it is a folder, and not a link to one, in which nothing lies but what a run saves."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()} - SAVED_FILES
    return all(re.fullmatch(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", name) for name in names)


def remove_older(run_dir: Path, n_kept: int = N_KEPT, step: int | None = None) -> None:
    """Remove all but the newest checkpoints, and what interrupted writes left behind.

    Of the best weights those stay that were the best at one of these checkpoints, or are now, at a run's `step`.
    """
    found = [folder for folder in checkpoints(run_dir) if _is_plain(folder)]
    kept, dropped = found[len(found) - n_kept :] if n_kept else [], found[: max(0, len(found) - n_kept)]
    at = [*map(step_of, kept), *(() if step is None else (step,))]
    best = best_weights(run_dir)
    best_kept = {path for last in at for path in [each for each in best if step_of(each) <= last][-1:]}
    dropped += [path for path in best if _is_plain(path) and path not in best_kept]
    for folder in dropped:
        folder.rename(folder.with_name(f".{folder.name}.tmp"))  # at no time is a checkpoint there in part
    for path in _entries(run_dir):
        if re.fullmatch(r"\.(step|best)_\d{8,}(\.\d+)?\.tmp", path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    if not n_kept:
        with suppress(OSError):  # not there, or not empty: what others put there stays
            (run_dir / CHECKPOINTS_DIR).rmdir()
