"""Reading PEFT's adapters: everything that can be wrong with one is found before a tensor of it is read."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama_ft.config import ModelConfig, UserError
from llama_ft.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, WEIGHTS_FILE
from llama_ft.model.formats import is_rotated, our_name
from llama_ft.model.mapped import StoredTensor, read_pth, read_safetensors
from llama_ft.model.sizes import SIZES_KEY, check_sizes, own_sizes, read_json
from llama_ft.model.transformer import EMBEDDING, OUTPUT, Transformer
from llama_ft.techniques.peft import PREFIX, Adapter, Factors, peft_name

PICKLE_FILE = "adapter_model.bin"  # of PEFT before 0.6
# Keys of adapter_config.json that change nothing here: what was trained, by whom and from where. All others must be
# off, unless they are read below.
_NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_INITS = (True, False, "gaussian", "eva", "orthogonal")  # the others take something out of the base's weights


def read_adapter(folder: Path, model: ModelConfig) -> Adapter:
    """Find an adapter in a folder and check that it is one of this model. None of its tensors is read.

    Raises:
        UserError: if there is none, it is damaged, of another model, or of another kind than LoRA.
    """
    try:
        config, (tensors, metadata) = _read_files(folder)
        file = folder / ADAPTER_FILE
        if SIZES_KEY in metadata:
            check_sizes(own_sizes(metadata[SIZES_KEY], file), model, file)
        return _Reader(folder, config, model).adapter(tensors)
    except OSError as error:
        raise UserError(f"adapter={folder} cannot be read: {error.strerror}") from error
    except UserError as error:
        text = str(error)
        raise UserError(text if f"{folder}{os.sep}" in text else f"adapter={folder}: {text}") from error


def _read_files(folder: Path) -> tuple[dict[str, Any], tuple[dict[str, StoredTensor], dict[str, str]]]:
    if not folder.is_dir():
        raise UserError(
            "it is a file: give the folder that it lies in" if folder.exists() else "there is no such folder"
        )
    config, file, pickled = (folder / name for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE, PICKLE_FILE))
    if not (file.is_file() or pickled.is_file()):
        hint = "give the folder of a run with LoRA, or of a PEFT adapter"
        if (folder / WEIGHTS_FILE).is_file():
            hint = f"its {WEIGHTS_FILE} is a whole model: give checkpoint={folder} and no adapter"
        raise UserError(f"there is no {ADAPTER_FILE} in it; {hint}")
    if not config.is_file():
        raise UserError(f"there is no {ADAPTER_CONFIG_FILE} in it, which says how the adapter is scaled")
    return read_json(config, "how the adapter is scaled"), read_safetensors(file) if file.is_file() else (
        read_pth(pickled),
        {},
    )


class _Reader:
    """Takes an adapter's files apart."""

    def __init__(self, folder: Path, config: dict[str, Any], model: ModelConfig) -> None:
        self.folder, self.config, self.model = folder, config, model
        with torch.device("meta"):
            modules = Transformer(model).named_modules()
        self.linears = {name: module for name, module in modules if isinstance(module, nn.Linear)}
        self._check_config()

    def _check_config(self) -> None:
        config = self.config
        if config.get("peft_type") != "LORA":
            raise UserError(
                f"{ADAPTER_CONFIG_FILE} says peft_type={config.get('peft_type')}, and only LORA can be used"
            )
        for key in config.keys() - _NO_MATTER - _READ:
            if config[key] not in (None, False, "none", "", [], {}):
                raise UserError(f"{ADAPTER_CONFIG_FILE} says {key}={config[key]}, which is not supported")
        init = config.get("init_lora_weights", True)
        if not any(init is allowed or (isinstance(init, str) and init == allowed) for allowed in _INITS):
            raise UserError(
                f"{ADAPTER_CONFIG_FILE} says init_lora_weights={init}: such an adapter belongs to weights that differ"
                " from the checkpoint's; save it with PEFT's path_initial_model_for_weight_conversion"
            )
        if not isinstance(config.get("use_rslora", False), bool):
            raise UserError(f"{ADAPTER_CONFIG_FILE}: use_rslora must be true or false")
        self._number("r", config.get("r"))
        self._number("lora_alpha", config.get("lora_alpha"))
        for key, number in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns = config.get(key) or {}
            if not isinstance(patterns, dict):
                raise UserError(f"{ADAPTER_CONFIG_FILE}: {key} must be an object of patterns and numbers")
            for pattern, value in patterns.items():
                self._number(f"{number} of {pattern}", value)
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"{ADAPTER_CONFIG_FILE}: {key} has {pattern}: {error}") from error

    def _number(self, key: str, value: object) -> None:
        if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
            raise UserError(f"{ADAPTER_CONFIG_FILE}: {key} is {value}, and must be a positive number")

    def adapter(self, tensors: Mapping[str, StoredTensor]) -> Adapter:
        """Sort out the tensors."""
        pairs: dict[str, dict[str, StoredTensor]] = {}
        copies: dict[str, StoredTensor] = {}
        for name, stored in tensors.items():
            match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
            if match is None:
                copies[self._base_name(name)] = stored
                continue
            weight = our_name(f"{match[1]}.weight")
            layer = (weight or "").removesuffix(".weight")
            if layer not in self.linears:
                raise UserError(f"{name} in it belongs to no linear layer of model={self.model.name}")
            pairs.setdefault(layer, {})[match[2]] = stored
        if not pairs:
            raise UserError("there is no lora_A or lora_B in it")
        return Adapter(self.folder, {layer: self._factors(layer, pair) for layer, pair in pairs.items()}, copies)

    def _base_name(self, name: str) -> str:
        """Our name of a weight of the base, of which PEFT keeps a copy where the embedding or output is adapted."""
        match = re.fullmatch(re.escape(PREFIX) + r"(.+?)(\.base_layer)?\.weight", name)
        ours = our_name(f"{match[1]}.weight") if match else None
        if ours not in (EMBEDDING, OUTPUT):
            raise UserError(
                f"{name} in it is no part of a LoRA adapter of a linear layer, and nothing else is supported"
            )
        return ours

    def _factors(self, layer: str, pair: dict[str, StoredTensor]) -> Factors:
        linear, theirs = self.linears[layer], peft_name(layer)
        if missing := {"A", "B"} - pair.keys():
            raise UserError(f"{theirs} has no lora_{missing.pop()} in it")
        rank = self._by_pattern("rank_pattern", "r", theirs)
        for which, shape in (("A", [rank, linear.in_features]), ("B", [linear.out_features, rank])):
            if pair[which].shape != shape:
                raise UserError(
                    f"{theirs}.lora_{which} is {pair[which].shape}, and for model={self.model.name} and r={rank} should"
                    f" be {shape}: it is an adapter of another model, or damaged"
                )
        n_heads = linear.out_features // self.model.head_dim if is_rotated(f"{layer}.weight") else None
        alpha = self._by_pattern("alpha_pattern", "lora_alpha", theirs)
        return Factors(pair["A"], pair["B"], alpha, self.config.get("use_rslora", False), n_heads)

    def _by_pattern(self, patterns: str, default: str, layer: str) -> Any:
        """A number that may differ by layer; the first pattern that fits the end of its name wins, as in PEFT."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer.removeprefix(PREFIX)):
                return value
        return self.config[default]
