"""Saves a run while it trains, and resumes it bit by bit as if it had not stopped.

A checkpoint is a folder of safetensors and JSON, without code. It is renamed into place once it is complete.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from llama_ft.config import Strategy, UserError
from llama_ft.files import WEIGHTS_FILE, to_disk, write_json
from llama_ft.model.four_bit import is_in_4_bits
from llama_ft.model.sharded import whole
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import read_into, save_tensors
from llama_ft.model.writing import in_order
from llama_ft.parallel.checkpoint import SHARDS, read_split, write_split
from llama_ft.parallel.ranks import ALONE, Ranks
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


def save_trained(model: Transformer, folder: Path, base: str | None = None, ranks: Ranks = ALONE) -> None:
    """Write the trained weights: all of them, or the adapter with the name of its checkpoint.

    The first process writes, but all must call this function, since split weights are gathered one by one. A UserError
    if writing fails, or if weights are in 4 bits.
    """
    if lora_layers(model):
        save_adapter(model, folder, base, writes=ranks.is_first)
    elif is_in_4_bits(model):
        raise UserError("4-bit weights cannot be saved: convert merges an adapter into the checkpoint's own weights")
    elif ranks.is_first:
        save_tensors(dict(model.named_parameters()), folder / WEIGHTS_FILE, model.config)
    else:
        for _, parameter in in_order(dict(model.named_parameters())):
            whole(parameter.detach())


class Saver:
    """Saves a run's checkpoints, and the best weights so far.

    `run_hash` covers the settings that stay when a run is trained longer, or on other processes.
    """

    def __init__(self, run_dir: Path, config_hash: str, step: TrainStep, run_hash: str | None = None) -> None:
        self._run_dir, self._hashes, self._step, self._ranks = run_dir, (config_hash, run_hash), step, step.ranks

    def save(self, position: Position) -> None:
        """Write a checkpoint; a UserError if that fails, and earlier ones are kept."""
        config_hash, run_hash = self._hashes
        scaler, rng = self._step.scaler.state_dict(), self._ranks.gathered(_rng_states(self._step.device))
        states = {f"{key}.{rank}" if rank else key: each for rank, own in enumerate(rng) for key, each in own.items()}
        state = SavedState(config_hash, position, run_hash, scaler, states)
        self._write(f"step_{position.step:08}", state)
        if self._ranks.is_first:
            remove_older(self._run_dir)

    def save_best(self, step: int) -> None:
        """Save the weights after this optimizer step, the best so far; a UserError as in `save`."""
        self._write(self.best_folder(step).name)
        if self._ranks.is_first:
            remove_older(self._run_dir, step=step)

    def best_folder(self, step: int) -> Path:
        """The folder for best weights saved after this optimizer step."""
        return self._run_dir / CHECKPOINTS_DIR / f"best_{step:08}"

    def _write(self, name: str, state: SavedState | None = None) -> None:
        """Write a whole folder with the trained weights and, if there is a state, the optimizer's tensors."""
        ranks, final = self._ranks, self._run_dir / CHECKPOINTS_DIR / name
        temporary = final.with_name(f".{name}.{ranks.gathered(os.getpid())[0]}.tmp")
        try:
            if ranks.is_first:
                temporary.mkdir(parents=True)
            ranks.wait()
            if ranks.any(ranks.strategy is Strategy.fsdp and not temporary.is_dir()):
                raise UserError(f"{final} must be on a disk shared by all machines: each process writes its rows there")
            optimizer = self._optimizer_tensors() if state else {}
            if ranks.strategy is Strategy.fsdp:
                write_split(self._trained() | optimizer, temporary)
            elif ranks.is_first:
                save_trained(self._step.model, temporary)
                if state:
                    save_tensors(optimizer, temporary / OPTIMIZER_FILE, self._step.model.config)
            if ranks.is_first:
                _complete(temporary, final, state)
            ranks.wait()
        except UserError as error:
            raise UserError(str(error).replace(str(temporary), str(final))) from error
        except OSError as error:
            raise UserError(f"{final} cannot be written: {error.strerror}") from error
        finally:
            if ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)

    def restore(self) -> Position | None:
        """Restore the newest checkpoint, if any, into state that a dry run has allocated; a UserError if damaged."""
        found = checkpoints(self._run_dir)
        if self._ranks.total(int(bool(found))) not in (0, self._ranks.world_size):
            raise UserError(f"{self._run_dir} has checkpoints that not all machines see: it must be on a shared disk")
        if not found:
            return None
        saved = read_state(found[-1])
        self.read_trained(found[-1], self._optimizer_tensors())
        try:
            self._step.scaler.load_state_dict(saved.scaler)
            _set_rng_states(saved.rng, self._step.device, self._ranks.rank)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            raise UserError(f"{found[-1] / STATE_FILE} is damaged: {error}") from error
        return saved.position

    def read_trained(self, folder: Path, optimizer: Mapping[str, Tensor] | None = None) -> None:
        """Read weights into the model, and optimizer tensors if given, from a folder; a UserError if it is damaged."""
        model = self._step.model
        if any(folder.glob(SHARDS)):  # written by several processes, of any number
            read_split(self._trained() | dict(optimizer or {}), folder, self._ranks)
            return
        if layers := lora_layers(model):
            copy_factors(read_adapter(folder, model.config), layers)
        else:
            read_into(dict(model.named_parameters()), folder / WEIGHTS_FILE)
        if optimizer is not None:
            read_into(optimizer, folder / OPTIMIZER_FILE)

    def _trained(self) -> dict[str, Tensor]:
        return {name: each for name, each in self._step.model.named_parameters() if each.requires_grad}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors by parameter and name, such as `norm.weight:exp_avg`; scalars as [1]."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._step.model.named_parameters()}
        return {
            f"{names[parameter]}:{key}": tensor.view(1) if tensor.dim() == 0 else tensor
            for parameter, state in self._step.optimizer.state.items()
            for key, tensor in state.items()
        }


def _complete(temporary: Path, final: Path, state: SavedState | None) -> None:
    if state:
        write_json(temporary / STATE_FILE, asdict(state))
    to_disk(temporary)
    if final.exists():  # best weights whose loss was not written to disk, so it was measured again
        shutil.rmtree(final)
    temporary.rename(final)


def _rng_states(device: torch.device) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(state.tolist()).hex() for name, state in states.items()}


def _set_rng_states(saved: dict[str, str], device: torch.device, rank: int) -> None:
    """Restore this process's random states; a process that the saved run did not have keeps its own."""
    suffix = f".{rank}" if rank else ""
    states = {name: torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8) for name, state in saved.items()}
    if rank == 0 or f"cpu{suffix}" in states:
        torch.set_rng_state(states[f"cpu{suffix}"])
    if device.type == "cuda" and f"cuda{suffix}" in states:
        torch.cuda.set_rng_state(states[f"cuda{suffix}"], device)
