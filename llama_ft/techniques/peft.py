"""LoRA adapters in the files of PEFT (https://github.com/huggingface/peft), which are those that a run leaves.

`adapter_config.json` says how the update is scaled, `adapter_model.safetensors` has the factors, under the names and in
the rotary layout of transformers: the rows of lora_B of wq and wk are permuted as those of the weights are.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llama_ft.config import UserError
from llama_ft.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, write_text
from llama_ft.model.formats import hf_name, is_rotated, permute_rotary
from llama_ft.model.mapped import StoredTensor
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import save_tensors
from llama_ft.techniques.lora import lora_layers

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """What is added to one linear layer: its place in the files, and its scale."""

    a: StoredTensor  # [rank, in_features]
    b: StoredTensor  # [out_features, rank], in Hugging Face's layout
    alpha: float
    rslora: bool
    n_heads: int | None  # where b's rows are permuted

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.a.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """A and B in our layout, as stored."""
        a, b = self.a.rows(0, self.rank), self.b.rows(0, self.b.shape[0])
        return a, b if self.n_heads is None else permute_rotary(b, self.n_heads, to_hf=False)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, checked against a model."""

    folder: Path
    factors: dict[str, Factors]  # by our names of the linear layers
    copies: dict[str, StoredTensor]  # of the base's weights, which PEFT adds where the output layer is adapted

    @property
    def weights(self) -> dict[str, Factors]:
        """The factors by our names of the weights that they are added to."""
        return {f"{layer}.weight": factors for layer, factors in self.factors.items()}


def save_adapter(model: Transformer, folder: Path, base: str | None) -> None:
    """Write the model's adapter.

    Args:
        base: the checkpoint that it was trained on, of which PEFT then knows the place; None names none.

    Raises:
        UserError: if it cannot be written.
    """
    layers = lora_layers(model)
    one = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if base in (None, "builtin", "random") else _absolute(str(base)),
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout.p,
        "use_rslora": one.rslora,
        "target_modules": sorted({peft_name(name).rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        rotated = is_rotated(f"{name}.weight")
        n_heads = layer.out_features // model.config.head_dim
        b = permute_rotary(layer.lora_B.detach(), n_heads, to_hf=True) if rotated else layer.lora_B
        tensors |= {f"{peft_name(name)}.lora_A.weight": layer.lora_A, f"{peft_name(name)}.lora_B.weight": b}
    file = folder / ADAPTER_CONFIG_FILE
    try:
        write_text(file, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error
    save_tensors(tensors, folder / ADAPTER_FILE, model.config)


def _absolute(folder: str) -> str:
    return os.path.abspath(os.path.expanduser(folder))


def peft_name(layer: str) -> str:
    """PEFT's name of one of our linear layers."""
    return PREFIX + hf_name(f"{layer}.weight").removesuffix(".weight")
