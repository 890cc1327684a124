"""The source of an export: a checkpoint's weights, with an adapter, if any, merged into them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_ft.config import ConvertConfig, Dtype, Format, ModelConfig, UserError, path_of
from llama_ft.device import DTYPES
from llama_ft.model.checkpoint import Checkpoint, open_checkpoint
from llama_ft.model.stored import Weight
from llama_ft.model.transformer import EMBEDDING, OUTPUT
from llama_ft.model.weights import build
from llama_ft.techniques.adapter import check_base_of, check_copies
from llama_ft.techniques.lora import lora_scale
from llama_ft.techniques.peft import Factors, read_adapter

Q8_0_BLOCK = 32  # numbers of a row that share a scale


@dataclass(frozen=True)
class Source:
    """A model to export, whose weights and adapter factors are read when needed."""

    model: ModelConfig
    checkpoint: Checkpoint
    weights: dict[str, Weight]  # in the dtype to write


def open_source(config: ConvertConfig) -> Source:
    """Open weights and adapter; a UserError if they are damaged, not this model's, or do not belong together."""
    builtin = config.checkpoint == "builtin"
    folder = config.model.builtin_dir if builtin else path_of(str(config.checkpoint))
    checkpoint = open_checkpoint(folder, build(config.model))
    sizes, own, changed = config.model, checkpoint.weights, dict[str, Weight]()
    if config.adapter is not None:
        adapter = read_adapter(path_of(config.adapter), config.model)
        check_base_of(adapter, str(config.checkpoint))
        if sizes.tie_word_embeddings and OUTPUT in adapter.weights:  # it gets its own weight
            sizes, own = replace(sizes, tie_word_embeddings=False), own | {OUTPUT: own[EMBEDDING]}
        check_copies(adapter, {OUTPUT: own[EMBEDDING]} | own)
        changed = {name: merged(own[name], factors) for name, factors in adapter.weights.items()}
    dtypes = {name: DTYPES.get(config.dtype.name, weight.dtype) for name, weight in own.items()}
    if config.to is Format.gguf:
        dtypes = {name: dtype_in_gguf(own[name], config.dtype, dtype) for name, dtype in dtypes.items()}
    weights = {name: rounded(name, weight, dtypes[name]) for name, weight in (own | changed).items()}
    return Source(sizes, checkpoint, weights)


def dtype_in_gguf(weight: Weight, asked: Dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype to write a weight in, or to quantize it from if its rows are whole blocks."""
    if len(weight.shape) == 1 or dtype == torch.float64:  # llama.cpp needs fp32 norms
        return torch.float32
    if asked is Dtype.q8_0:
        return torch.float16 if weight.shape[-1] % Q8_0_BLOCK else torch.float32
    return dtype


def rounded(name: str, weight: Weight, dtype: torch.dtype) -> Weight:
    """The weight in another dtype. Reading a number that is not finite or out of range raises a UserError."""

    def pieces(multiple: int, wanted: range | None = None) -> Iterator[tuple[int, Tensor]]:
        for first, rows in weight.pieces(multiple, wanted):
            narrow = rows.to(dtype)
            if not narrow.isfinite().all():
                if not rows.isfinite().all():
                    raise UserError(f"{name} has NaN or infinite numbers: the weights are damaged, or of a failed run")
                dtype_name = str(dtype).removeprefix("torch.")
                raise UserError(f"{name} has numbers beyond the range of {dtype_name}: give dtype=bf16")
            yield first, narrow

    return Weight(weight.shape, dtype, pieces)


def merged(weight: Weight, factors: Factors) -> Weight:
    """The weight plus the adapter's update, in fp32 or wider."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = lora_scale(factors.rank, factors.alpha, factors.rslora)

    def pieces(multiple: int, wanted: range | None = None) -> Iterator[tuple[int, Tensor]]:
        a, b = (factor.to(dtype) for factor in factors.tensors())
        for first, rows in weight.pieces(multiple, wanted):
            yield first, rows + b[first : first + len(rows)] @ a * scale

    return Weight(weight.shape, dtype, pieces)
