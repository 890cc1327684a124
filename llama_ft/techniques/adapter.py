"""A trained LoRA adapter, put onto the weights that it was trained on."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from llama_ft.config import LoraConfig, ModelConfig, UserError
from llama_ft.files import ADAPTER_FILE, WEIGHTS_FILE
from llama_ft.model.checkpoint import SIZES_KEY
from llama_ft.model.formats import check_sizes
from llama_ft.model.mapped import read_safetensors
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import read_into
from llama_ft.techniques.lora import LoRALinear, add_lora

CONFIG_FILE = "config.yaml"  # of the run that trained it


def read_adapter(folder: Path, model: ModelConfig) -> LoraConfig:
    """How the adapter in a run's folder was made, once it is clear that it is one of this model.

    Raises:
        UserError: if there is no adapter, it is damaged, or of another model.
    """
    file = folder / ADAPTER_FILE
    if not folder.is_dir():
        raise UserError(f"adapter={folder}: {'it is a file' if folder.exists() else 'there is no such folder'}")
    if not file.is_file():
        hint = "give the folder of a run with LoRA"
        if (folder / WEIGHTS_FILE).is_file():
            hint = f"its {WEIGHTS_FILE} is a whole model: give checkpoint={folder} and no adapter"
        raise UserError(f"adapter={folder}: there is no {ADAPTER_FILE} in it; {hint}")
    _, metadata = read_safetensors(file)
    try:
        sizes = json.loads(metadata[SIZES_KEY])
        lora = LoraConfig(**cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / CONFIG_FILE)))["lora"])
        check_sizes(sizes, model, file)
    except UserError as error:
        text = str(error)
        raise UserError(text if str(folder) in text else f"adapter={folder}, {CONFIG_FILE}: {text}") from error
    except Exception as error:  # YAML's own errors, and whatever else a damaged file leads to
        raise UserError(f"adapter={folder}: its {CONFIG_FILE} or {ADAPTER_FILE} lacks how it was made") from error
    return lora


def check_base_of(folder: Path, checkpoint: str) -> None:
    """Compare the weights that an adapter was trained on with those that it is to be used with.

    Folders may have been moved and are not compared by name; what is built in, or random, is not a folder.

    Raises:
        UserError: if they are surely others.
    """
    try:
        trained_on = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / CONFIG_FILE))).get(
            "checkpoint"
        )
    except Exception:
        return  # read_adapter says what is wrong with it
    if trained_on not in (None, checkpoint) and {trained_on, checkpoint} & {"builtin", "random"}:
        raise UserError(
            f"adapter={folder} was trained on checkpoint={trained_on}, and this is checkpoint={checkpoint}:"
            f" give checkpoint={trained_on}"
        )


def load_adapter(model: Transformer, folder: Path, merge: bool) -> None:
    """Give a model the adapter in a run's folder.

    Args:
        merge: add it to the weights, which then cost no more than before; else it is computed beside them.

    Raises:
        UserError: if there is no adapter, it is damaged, or of another model.
    """
    lora = read_adapter(folder, model.config)
    add_lora(model, lora.rank, lora.alpha, 0.0, lora.targets, model.output.weight.dtype)
    adapted = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    read_into(adapted, folder / ADAPTER_FILE)
    model.eval()
    if merge:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LoRALinear):
                    module.merge()
