"""A trained LoRA adapter, put onto the weights that it was trained on."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from llama_ft.config import LoraConfig, UserError
from llama_ft.files import ADAPTER_FILE
from llama_ft.model.checkpoint import SIZES_KEY
from llama_ft.model.formats import check_sizes
from llama_ft.model.mapped import read_safetensors
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import read_into
from llama_ft.techniques.lora import LoRALinear, add_lora

CONFIG_FILE = "config.yaml"  # of the run that trained it


def load_adapter(model: Transformer, folder: Path, merge: bool) -> None:
    """Give a model the adapter in a run's folder.

    Args:
        merge: add it to the weights, which then cost no more than before; else it is computed beside them.

    Raises:
        UserError: if there is no adapter, it is damaged, or of another model.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise UserError(f"adapter={folder}: there is no {ADAPTER_FILE} in it; give the folder of a run with LoRA")
    _, metadata = read_safetensors(file)
    try:
        sizes = json.loads(metadata[SIZES_KEY])
        lora = LoraConfig(**cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / CONFIG_FILE)))["lora"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"adapter={folder}: its {CONFIG_FILE} or {ADAPTER_FILE} lacks how it was made") from error
    check_sizes(sizes, model.config, file)
    add_lora(model, lora.rank, lora.alpha, 0.0, lora.targets, model.output.weight.dtype)
    adapted = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    read_into(adapted, file)
    model.eval()
    if merge:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LoRALinear):
                    module.merge()
