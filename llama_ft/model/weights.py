"""Making, loading and saving a model's weights."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from llama_ft.config import ModelConfig, UserError
from llama_ft.files import whole_file
from llama_ft.model.checkpoint import Checkpoint, open_checkpoint
from llama_ft.model.mapped import read_safetensors
from llama_ft.model.sizes import SIZES_KEY
from llama_ft.model.transformer import Transformer, rotary_table

INIT_STD = 0.02  # as transformers' initializer_range


def load_model(
    config: ModelConfig,
    checkpoint: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Transformer:
    """A model with the weights of `checkpoint`: `random` (seeded), `builtin`, or a folder in any format that we read.

    The weights are allocated once, on their device and in their dtype. `say` hears of a folder's being read.

    Raises:
        UserError: if the folder has no weights for this model.
    """
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    source = _open(checkpoint, model)
    model.to_empty(device=device)
    model.tie()
    model.rotary = rotary_table(config, device)
    if source is not None:
        source.load_into(model, log if checkpoint != "builtin" else lambda line: None)
    else:
        initialize(model, seed)
    return model


def _open(checkpoint: str, model: Transformer) -> Checkpoint | None:
    """The checkpoint's folder, opened; None for random weights."""
    if checkpoint == "random":
        return None
    if checkpoint != "builtin":
        return open_checkpoint(Path(os.path.expanduser(checkpoint)), model)
    try:
        return open_checkpoint(model.config.builtin_dir, model)
    except UserError as error:
        raise UserError(f"{error}; a model of your own sizes begins with checkpoint=random") from error


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Normal(0, 0.02) for matrices and 1 for norms, from the seed alone; drawn on the device the weights are on."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, INIT_STD, generator=generator)


def save_tensors(tensors: Mapping[str, Tensor], file: Path, config: ModelConfig) -> None:
    """Write safetensors under a temporary name, then rename: the file is whole or absent.

    Args:
        config: of the model that the tensors belong to. Its sizes become metadata, to be checked when they are loaded.

    Raises:
        UserError: if the disk is full or cannot be written to.
    """
    sizes = {key: value for key, value in asdict(config).items() if key != "name"}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with whole_file(file) as temporary:
            save_file(on_cpu, temporary, metadata={"format": "pt", SIZES_KEY: json.dumps(sizes)})
    except (OSError, SafetensorError) as error:
        n_mib = sum(tensor.nbytes for tensor in on_cpu.values()) / 2**20
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} ({n_mib:,.0f} MiB) cannot be written: {reason}") from error


@torch.no_grad()
def read_into(targets: Mapping[str, Tensor], file: Path) -> None:
    """Copy a file's tensors into tensors of the same names.

    Raises:
        UserError: unless names and shapes agree.
    """
    stored, _ = read_safetensors(file)
    if {name: list(tensor.shape) for name, tensor in targets.items()} != {n: part.shape for n, part in stored.items()}:
        raise UserError(f"{file} does not hold the tensors that are expected here: it is damaged, or of something else")
    for name, part in stored.items():
        for first, rows in part.pieces():
            targets[name][first : first + len(rows)].copy_(rows)
