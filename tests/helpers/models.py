"""Small models, and how far two tensors are apart."""

import torch
from torch import Tensor

from llama_ft.config import ModelConfig
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model

CPU = torch.device("cpu")


def small_config(n_kv_heads: int = 4) -> ModelConfig:
    return ModelConfig(
        name="small", dim=64, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, ffn_dim=96, vocab_size=101, max_seq_len=64
    )


def small_model(n_kv_heads: int = 4, seed: int = 0) -> Transformer:
    model = load_model(small_config(n_kv_heads), "random", CPU, torch.float32, seed)
    with torch.no_grad():
        for parameter in model.parameters():  # away from 0.02, so that attention and gains are far from uniform
            parameter.mul_(5.0) if parameter.dim() == 2 else parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()
