"""`torch.compile` (Ansel et al. 2024, doi 10.1145/3620665.3640366) of the model's layers."""

import warnings

import torch

from llama_ft.model.transformer import Attention, Transformer, TransformerBlock


def compile_layers(model: Transformer, is_packed: bool = False) -> None:
    """Compile each layer when it first runs, for batches of any length. Identical layers share compiled code.

    `is_packed` excludes attention, which would be recompiled for the lengths in each packed row.
    """
    # The complex products of rotary embeddings are not compiled.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex operators")
    for module in model.layers.modules():
        if is_packed and isinstance(module, Attention):
            module.attend = torch.compiler.disable(module.attend)
        if isinstance(module, TransformerBlock):
            module.compile(dynamic=True)
