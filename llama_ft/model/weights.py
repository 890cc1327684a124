"""Making, loading and saving a model's weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llama_ft.config import ModelConfig, UserError, path_of
from llama_ft.files import explained, whole_file
from llama_ft.kernels import use_products_of
from llama_ft.model.checkpoint import Checkpoint, open_checkpoint
from llama_ft.model.mapped import MOMENTS_DTYPES, SAFETENSORS_DTYPES, read_safetensors
from llama_ft.model.sharded import is_split, memory_for, own, own_rows, write_rows
from llama_ft.model.sizes import SIZES_KEY
from llama_ft.model.storage import Storage
from llama_ft.model.stored import in_memory
from llama_ft.model.transformer import Transformer, rotary_table
from llama_ft.model.writing import write_safetensors
from llama_ft.system import Log, silent

INIT_STD = 0.02  # as transformers' initializer_range


@dataclass(frozen=True)
class RandomWeights:
    """Normal(0, 0.02) for matrices, 1 for norms, 0 for biases; drawn from the seed on the weights' device."""

    shapes: Mapping[str, torch.Size]  # of the decoder's own parameters, in the order of drawing
    seed: int

    @torch.no_grad()
    def load_into(self, model: Transformer, storage: Storage, log: Log) -> None:
        """Fill a materialized model, even if techniques have replaced its modules."""
        generator = torch.Generator(device := model.rotary.device).manual_seed(self.seed)
        for name, shape in self.shapes.items():
            parameter = model.get_parameter(name)
            if len(shape) == 1:
                own(parameter).fill_(0.0 if name.endswith(".bias") else 1.0)
            elif parameter.is_floating_point() and not is_split(parameter):
                parameter.normal_(0.0, INIT_STD, generator=generator)
            else:
                dtype = parameter.dtype if parameter.is_floating_point() else model.norm.weight.dtype
                drawn = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, INIT_STD, generator=generator)
                storage.load(model, name, in_memory(drawn))


def build(config: ModelConfig) -> Transformer:
    """Build a model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Transformer(config)


def open_weights(checkpoint: str, config: ModelConfig, seed: int = 0) -> Checkpoint | RandomWeights:
    """The weights of `checkpoint`: `random` (seeded), `builtin`, or a folder in any supported format.

    Nothing is read yet, but a folder without weights for this model raises a UserError.
    """
    model = build(config)
    if checkpoint == "random":
        return RandomWeights({name: parameter.shape for name, parameter in model.named_parameters()}, seed)
    if checkpoint != "builtin":
        return open_checkpoint(path_of(checkpoint), model)
    try:
        return open_checkpoint(config.builtin_dir, model)
    except UserError as error:
        raise UserError(f"{error}; a model with your own sizes needs checkpoint=random") from error


def materialize(model: Transformer, device: torch.device) -> None:
    """Allocate a meta-device model's parameters on their final device; they hold no values yet."""
    for module in model.modules():
        for name, shape_only in list(module.named_parameters(recurse=False)):
            memory = memory_for(shape_only, device)
            setattr(module, name, nn.Parameter(memory, requires_grad=shape_only.requires_grad))
    model.tie()
    model.rotary = rotary_table(model.config, device)


def load_model(
    config: ModelConfig,
    checkpoint: str,
    device: torch.device,
    stored: torch.dtype | Storage,
    seed: int = 0,
    log: Log = silent,
) -> Transformer:
    """Load a model with the weights of `checkpoint` (see `open_weights`) and no technique applied."""
    storage = Storage(stored) if isinstance(stored, torch.dtype) else stored
    weights, model = open_weights(checkpoint, config, seed), build(config)
    storage.prepare(model)
    use_products_of(device, storage.dtype)
    materialize(model, device)
    weights.load_into(model, storage, log)
    return model


def save_tensors(tensors: Mapping[str, Tensor], file: Path, config: ModelConfig) -> None:
    """Write a whole safetensors file with the model's sizes in its metadata; a UserError if it cannot be written."""
    weights = {name: in_memory(tensor) for name, tensor in tensors.items()}
    n_mib = sum(weight.n_bytes for weight in weights.values()) / 2**20
    with explained(f"{file} ({n_mib:,.0f} MiB) cannot be written"), whole_file(file) as temporary:
        write_safetensors(temporary, weights, lambda _: None, {SIZES_KEY: json.dumps(config.sizes)})


@torch.no_grad()
def read_into(targets: Mapping[str, Tensor], file: Path) -> None:
    """Copy a file's tensors into tensors of the same names; a UserError unless names and shapes agree."""
    stored, _ = read_safetensors(file, SAFETENSORS_DTYPES | MOMENTS_DTYPES)
    if {name: list(tensor.shape) for name, tensor in targets.items()} != {n: part.shape for n, part in stored.items()}:
        raise UserError(f"{file} does not hold the expected tensors: it is damaged, or another model's")
    for name, part in stored.items():
        for first, rows in part.pieces(1, own_rows(targets[name])):
            write_rows(targets[name], first, rows)
