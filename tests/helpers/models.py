"""Small models, adapters that change much, and how far two tensors are apart."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decode import reference
from llama_ft.config import ModelConfig
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model
from llama_ft.techniques.lora import add_lora
from llama_ft.training.saver import save_trained

__all__ = ["reference"]  # transformers' model with the same weights

CPU = torch.device("cpu")
# Named tiny, so that its tokenizer is the built-in one.
SMALL = ModelConfig("tiny", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=2048, max_seq_len=128)
_EIGHT = ModelConfig("small", dim=64, n_layers=3, n_heads=8, n_kv_heads=8, ffn_dim=96, vocab_size=300, max_seq_len=256)
SIZES = {"MHA": _EIGHT, "GQA": replace(_EIGHT, n_kv_heads=2), "MQA": replace(_EIGHT, n_kv_heads=1)}


def small_config(n_kv_heads: int = 4) -> ModelConfig:
    return ModelConfig(
        name="small", dim=64, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, ffn_dim=96, vocab_size=101, max_seq_len=64
    )


def small_model(n_kv_heads: int = 4, seed: int = 0, **features: bool) -> Transformer:
    model = load_model(replace(small_config(n_kv_heads), **features), "random", CPU, torch.float32, seed)
    with torch.no_grad():
        for parameter in model.parameters():  # away from 0.02, so that attention and gains are far from uniform
            parameter.mul_(5.0) if parameter.dim() == 2 else parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    return model


def make_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """In evaluation mode, with matrices far from uniform, so that mistakes show."""
    model = load_model(config, "random", CPU, torch.float32, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.eval()


def random_tokens(batch: int, length: int, seed: int = 0, vocabulary: int = 300) -> Tensor:
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, of the largest element of the second."""
    return ((a - b).abs().max() / b.abs().max()).item()


def trained_adapter(
    folder: Path,
    config: ModelConfig = SMALL,
    targets: tuple[str, ...] = ("wq", "w2"),
    alpha: float = 8.0,
    std: float = 0.3,
    base: str | None = None,
) -> Path:
    """What a run with LoRA of rank 4 leaves, with an adapter that changes much."""
    folder.mkdir()
    adapted = make_model(config)
    add_lora(adapted, 4, alpha, 0.0, targets)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=std)
    save_trained(adapted, folder, base)
    return folder


def change_json(file: Path, **values: object) -> None:
    """Change values of a JSON object's keys, or add some."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
