"""Saving a run while it trains, and going on from where it was saved, to the bit.

A checkpoint is a folder of safetensors and JSON: nothing in it is code. It appears whole, by being renamed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from llama_ft.config import UserError
from llama_ft.files import WEIGHTS_FILE, to_disk, write_json
from llama_ft.model.four_bit import is_in_4_bits
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import read_into, save_tensors
from llama_ft.techniques.adapter import copy_factors
from llama_ft.techniques.lora import lora_layers
from llama_ft.techniques.peft import read_adapter, save_adapter
from llama_ft.training.position import (
    CHECKPOINTS_DIR,
    OPTIMIZER_FILE,
    STATE_FILE,
    Position,
    SavedState,
    checkpoints,
    read_state,
    remove_older,
)
from llama_ft.training.step import TrainStep


def save_trained(model: Transformer, folder: Path, base: str | None = None) -> None:
    """Write what was trained: all weights, or the adapter, with the name of the checkpoint that it belongs to.

    Raises:
        UserError: if it cannot be written, or weights are in 4 bits.
    """
    if lora_layers(model):
        save_adapter(model, folder, base)
    elif is_in_4_bits(model):
        raise UserError("weights in 4 bits are not saved: convert merges an adapter into the checkpoint's own weights")
    else:
        save_tensors(dict(model.named_parameters()), folder / WEIGHTS_FILE, model.config)


class Saver:
    """A run's checkpoints, and the weights that were the best so far.

    `run_hash` is of what stays of the config when a run is trained longer.
    """

    def __init__(self, run_dir: Path, config_hash: str, step: TrainStep, run_hash: str | None = None) -> None:
        self._run_dir, self._hashes, self._step = run_dir, (config_hash, run_hash), step

    def save(self, position: Position) -> None:
        """Write a checkpoint.

        Raises:
            UserError: if it cannot be written; those before it stay.
        """
        with self._new_folder(f"step_{position.step:08}") as folder:
            save_tensors(self._optimizer_tensors(), folder / OPTIMIZER_FILE, self._step.model.config)
            scaler, rng = self._step.scaler.state_dict(), _rng_states(self._step.device)
            config_hash, run_hash = self._hashes
            state = SavedState(config_hash, position, run_hash, scaler, rng)
            write_json(folder / STATE_FILE, asdict(state))
        remove_older(self._run_dir)

    def save_best(self, step: int) -> None:
        """Keep the weights as they are after this optimizer step, the best so far.

        Raises:
            UserError: if they cannot be written; those before them stay.
        """
        with self._new_folder(self.best_folder(step).name):
            pass
        remove_older(self._run_dir, step=step)

    def best_folder(self, step: int) -> Path:
        """Where the best weights are, those after this optimizer step."""
        return self._run_dir / CHECKPOINTS_DIR / f"best_{step:08}"

    @contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        """A folder with what is trained, and with what the block adds; it appears whole."""
        final = self._run_dir / CHECKPOINTS_DIR / name
        temporary = final.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True)
            save_trained(self._step.model, temporary)
            yield temporary
            to_disk(temporary)
            if final.exists():  # best weights whose loss did not reach the disk: it was measured again
                shutil.rmtree(final)
            temporary.rename(final)
        except UserError as error:
            raise UserError(str(error).replace(str(temporary), str(final))) from error
        except OSError as error:
            raise UserError(f"{final} cannot be written: {error.strerror}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def restore(self) -> Position | None:
        """Put the newest checkpoint's state back, after a dry run has allocated it; None where there is none.

        Raises:
            UserError: if the checkpoint is damaged.
        """
        found = checkpoints(self._run_dir)
        if not found:
            return None
        saved = read_state(found[-1])
        self.read_trained(found[-1])
        read_into(self._optimizer_tensors(), found[-1] / OPTIMIZER_FILE)
        try:
            self._step.scaler.load_state_dict(saved.scaler)
            _set_rng_states(saved.rng, self._step.device)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            raise UserError(f"{found[-1] / STATE_FILE} is damaged: {error}") from error
        return saved.position

    def read_trained(self, folder: Path) -> None:
        """Put the weights of a checkpoint, or the best, back; a UserError if they are damaged."""
        model = self._step.model
        if layers := lora_layers(model):
            copy_factors(read_adapter(folder, model.config), layers)
        else:
            read_into(dict(model.named_parameters()), folder / WEIGHTS_FILE)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors by parameter and name, such as `norm.weight:exp_avg`; scalars as [1]."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._step.model.named_parameters()}
        return {
            f"{names[parameter]}:{key}": tensor.view(1) if tensor.dim() == 0 else tensor
            for parameter, state in self._step.optimizer.state.items()
            for key, tensor in state.items()
        }


def _rng_states(device: torch.device) -> dict[str, str]:
    """The states of the random generators that a run uses, in hex."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(state.tolist()).hex() for name, state in states.items()}


def _set_rng_states(saved: dict[str, str], device: torch.device) -> None:
    states = {name: torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8) for name, state in saved.items()}
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
