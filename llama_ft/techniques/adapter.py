"""Trained LoRA adapters, merged into a model's weights or computed next to them, one of several at a time."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from llama_ft.config import ModelConfig, UserError, path_of
from llama_ft.model.sharded import write_rows
from llama_ft.model.stored import Weight, are_equal, in_memory
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import build
from llama_ft.techniques.lora import LoRALinear, lora_layers
from llama_ft.techniques.peft import Adapter, read_adapter


def check_base_of(adapter: Adapter, checkpoint: str) -> None:
    """Raise a UserError if an adapter was certainly not trained on the weights of `checkpoint`.

    Folders may have been moved, or may hold the built-in weights, so their names are not compared. Only random weights
    are certain to be neither a folder's nor the built-in ones.
    """
    if adapter.base not in (None, "", checkpoint) and "random" in (adapter.base, checkpoint):
        trained = f"adapter={adapter.folder} was trained on checkpoint={adapter.base}"
        raise UserError(f"{trained}, but this is checkpoint={checkpoint}: give checkpoint={adapter.base}")


def lora_settings(folder: str, model: ModelConfig, checkpoint: str | None) -> dict[str, float | bool | list[str]]:
    """The `LoraConfig` settings that an adapter was made with, to train it further.

    A UserError if it is not this model's, or if no single set of settings describes all of its layers.
    """
    adapter = read_adapter(path_of(folder), model)
    check_base_of(adapter, checkpoint or "builtin")
    (kind, *others) = {(factors.rank, factors.alpha, factors.rslora) for factors in adapter.factors.values()}
    linears = [name for name, layer in build(model).named_modules() if isinstance(layer, nn.Linear)]
    names = {name: name.rpartition(".")[2] for name in linears}
    targets = set(map(names.get, adapter.factors))
    if others or {name for name in names if names[name] in targets} != adapter.factors.keys():
        problem = f"adapter={folder} has layers or ranks of several kinds, so it cannot be trained further"
        raise UserError(f"{problem}: merge it into the weights with convert, then train a new one on them")
    rank, alpha, rslora = kind
    ordered = [name for name in dict.fromkeys(names.values()) if name in targets]
    return {"rank": rank, "alpha": float(alpha), "rslora": rslora, "targets": ordered}


def begin_with(model: Transformer, folder: str) -> None:
    """Put an adapter's factors into the model's LoRA layers, to train it further; a UserError if it does not fit."""
    adapter = read_adapter(path_of(folder), model.config)
    check_copies(adapter, {name: in_memory(model.get_parameter(name)) for name in adapter.copies})
    copy_factors(adapter, lora_layers(model))


def load_adapter(model: Transformer, folder: Path, merge: bool = True) -> None:
    """Give a model the adapter in a folder; the model is then in evaluation mode.

    If merged, it is added to the weights and costs nothing extra; otherwise it is computed next to them. An adapter
    that is missing, damaged, or another model's is a UserError.
    """
    adapter = read_adapter(folder, model.config)
    if merge:
        model.untie(adapter.weights.keys())
    for name, layer in adapted_layers(model, adapter, torch.float32 if merge else model.norm.weight.dtype).items():
        if merge:
            layer.merge()
            model.get_submodule(name).weight = layer.weight  # a new one if it was in 4 bits
        else:
            model.set_submodule(name, layer)
    model.eval()


class Adapters:
    """Several LoRA adapters over one model's weights, of which one, or none, is used at a time.

    The weights are not changed: a linear layer is replaced by one with the same weight and the adapter's factors.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._plain: dict[str, nn.Module] = {}  # the layers without adapters
        self._adapted: dict[str, dict[str, LoRALinear]] = {}  # by adapter and layer
        self.used: str | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._adapted

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter, to be used later by name; a UserError if it is damaged or another model's."""
        adapter, used = read_adapter(folder, self._model.config), self.used
        self.use(None)
        try:
            self._adapted[name] = adapted_layers(self._model, adapter, self._model.norm.weight.dtype)
            self._plain |= {layer: self._model.get_submodule(layer) for layer in self._adapted[name]}
        finally:
            self.use(used)

    def use(self, name: str | None) -> None:
        """Compute with this adapter from now on; None is the model without adapters."""
        for layer, linear in self._plain.items():
            self._model.set_submodule(layer, linear)
        for layer, adapted in self._adapted[name].items() if name is not None else ():
            self._model.set_submodule(layer, adapted)
        self.used = name
        self._model.eval()


def adapted_layers(model: Transformer, adapter: Adapter, dtype: torch.dtype) -> dict[str, LoRALinear]:
    """Frozen layers with the model's weights and the adapter's factors, by name; a UserError if its copies differ."""
    check_copies(adapter, {name: in_memory(model.get_parameter(name)) for name in adapter.copies})
    layers = {}
    for name, factors in adapter.factors.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layers[name] = LoRALinear(base, factors.rank, factors.alpha, rslora=factors.rslora, dtype=dtype)
    copy_factors(adapter, layers)
    for layer in layers.values():
        layer.requires_grad_(False)
    return layers


@torch.no_grad()
def copy_factors(adapter: Adapter, layers: Mapping[str, LoRALinear]) -> None:
    """Put an adapter's factors into layers; a UserError unless names and ranks agree."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    if ranks != {name: factors.rank for name, factors in adapter.factors.items()}:
        raise UserError(f"{adapter.folder} does not hold the expected adapter: its layers or rank differ")
    for name, factors in adapter.factors.items():
        a, b = factors.tensors()
        write_rows(layers[name].lora_A, 0, a)
        write_rows(layers[name].lora_B, 0, b)


def check_copies(adapter: Adapter, base: Mapping[str, Weight]) -> None:
    """Raise a UserError if an adapter's copies of base weights differ by more than rounding to one of the dtypes.

    PEFT saves copies if the output layer is adapted, and loads them in place of the base model's own.
    """
    for name, copy in adapter.copies.items():
        if not are_equal(base[name], Weight(copy.shape, copy.dtype, copy.pieces)):
            cause = "it is an adapter for other weights, or its embedding or output was trained"
            problem = f"also holds {name}, which differs from the checkpoint's: {cause}, which is not supported"
            raise UserError(f"adapter={adapter.folder} {problem}")
