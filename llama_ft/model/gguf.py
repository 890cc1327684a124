"""Reads a model's sizes and weights, quantized or not, from a GGUF file, llama.cpp's format."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from llama_ft.config import FEATURES, ModelConfig, UserError
from llama_ft.config.checks import Settings
from llama_ft.gguf_file import Header, read_header
from llama_ft.model.formats import hf_name
from llama_ft.model.mapped import Part, QuantizedTensor, StoredTensor, mapped
from llama_ft.model.sizes import META_SCALING, Sizes, numbers_of
from llama_ft.model.transformer import rotary_frequencies


class Architecture(NamedTuple):
    """An architecture of llama.cpp."""

    features: tuple[str, ...] = ()  # of `FEATURES`
    in_halves: bool = True  # wq and wk are in Hugging Face's rotary layout


ARCHITECTURES = {  # Mistral uses LLaMA's, the only one that llama.cpp stores in Meta's layout
    "llama": Architecture(in_halves=False),
    "qwen2": Architecture(("qkv_bias",)),
    "qwen3": Architecture(("qk_norm",)),
}
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
ROPE_FREQUENCIES = "rope_freqs.weight"  # the divisors of Llama 3.1's rotary frequencies
KEYS = {  # of sizes in the metadata, after the architecture's name
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "ffn_dim": "feed_forward_length",
    "max_seq_len": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_package(path: Path) -> ModuleType:
    """The package gguf; a UserError if it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UserError(f"{path} needs the package gguf: pip install 'llama_ft[gguf]'") from error
    return gguf


def read_gguf(path: Path) -> tuple[str, dict[str, Part]]:
    """The type of most weights, and the tensors by name. No tensor is read."""
    gguf, file, infos = gguf_package(path), mapped(path), read_header(path).tensors
    tensors: dict[str, Part] = {}
    counts: Counter[str] = Counter()
    for name, info in infos.items():
        kind = _kind(gguf, path, name, info.type_number)
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not info.shape or info.shape[-1] % block or (block > 1 and len(info.shape) == 1):
            raise UserError(f"{path} is damaged: {name}, {info.shape}, is not made of blocks of {block} ({kind.name})")
        dtype = _DTYPES.get(kind.name, torch.uint8)
        row_bytes = info.shape[-1] // block * n_bytes
        raw = StoredTensor(file, info.offset, dtype, [*info.shape[:-1], row_bytes // dtype.itemsize])
        if (end := raw.offset + raw.n_bytes) > len(file):
            missing = f"{name} should end at byte {end:,}, but the file has {len(file):,}"
            raise UserError(f"{path} was not downloaded or copied completely: {missing}")
        tensors[name] = raw if kind.name in _DTYPES else QuantizedTensor(raw, info.shape, kind, gguf.quants)
        counts[kind.name] += math.prod(info.shape)
    return max(counts, key=counts.__getitem__, default="empty"), tensors


def _kind(gguf: Any, path: Path, name: str, type_number: int) -> Any:
    kind: Any = type_number
    try:
        kind = gguf.GGMLQuantizationType(type_number)
        if kind.name not in _DTYPES:
            _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
            gguf.quants.dequantize(torch.zeros(1, n_bytes, dtype=torch.uint8).numpy(), kind)
    except (ValueError, NotImplementedError) as error:
        type_name = getattr(kind, "name", f"type {type_number}")
        raise UserError(f"{path}: {name} is stored as {type_name}, which is not supported") from error
    return kind


def architecture(path: Path) -> str:
    """The architecture named in a file; a UserError if it is not supported."""
    name = read_header(path).metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(f"{path}: the architecture {name} is not supported, it must be {', '.join(ARCHITECTURES)}")
    return str(name)


def architecture_of(config: ModelConfig) -> str:
    """The architecture for a model; a UserError if llama.cpp has none like it."""
    features = tuple(key for key in FEATURES if getattr(config, key))
    name = next((name for name, each in ARCHITECTURES.items() if each.features == features), None)
    if name is None:
        raise UserError(f"no architecture of llama.cpp has {' and '.join(features)}")
    return name


def gguf_names(config: ModelConfig) -> Callable[[str], str]:
    """A function from our names of a model's weights to llama.cpp's."""
    gguf: Any = gguf_package(Path("GGUF"))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture_of(config).upper()], config.n_layers)
    return lambda name: str(table.get_name(hf_name(name), (".weight", ".bias")))


def gguf_sizes(path: Path) -> Sizes:
    """The sizes in a file's metadata; a UserError if its architecture is not supported."""
    name, header = architecture(path), read_header(path)
    prefix = f"{name}."
    said = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    for key in ("expert_count", "attention.sliding_window"):
        if said.get(key):
            raise UserError(f"{path}: {prefix}{key}={said[key]} is not supported")
    defaults = {"n_kv_heads": said.get("attention.head_count"), "rope_theta": 10000.0}
    sizes: dict[str, Any] = numbers_of(said, KEYS, defaults, path)
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or not embedding.shape:
        raise UserError(f"{path}: it has no {EMBEDDING}")
    sizes |= {"vocab_size": embedding.shape[0], "tie_word_embeddings": OUTPUT not in header.tensors}
    usual = said.get("rope.dimension_count", sizes["dim"] // max(1, sizes["n_heads"]))
    head_dim = numbers_of(said, {"head_size": "attention.key_length"}, {"head_size": usual}, path)["head_size"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key, head_dim) != head_dim:
            raise UserError(f"{path}: {prefix}{key}={said[key]} is not supported, heads are {head_dim} wide")
    sizes["head_size"] = None if head_dim * sizes["n_heads"] == sizes["dim"] else head_dim
    sizes |= {key: key in ARCHITECTURES[name].features for key in FEATURES}
    return sizes | _rope(path, header, said, sizes)


def _rope(path: Path, header: Header, said: Mapping[str, Any], sizes: Mapping[str, Any]) -> Settings:
    factor = said.get("rope.scaling.factor") or said.get("rope.scale_linear") or 1.0
    kind = said.get("rope.scaling.type", "linear") if factor != 1 else "none"
    if kind not in ("linear", "none"):
        raise UserError(f"{path}: rotary embeddings of type {kind} are not supported, only linear and Llama 3.1's")
    if ROPE_FREQUENCIES not in header.tensors:
        return {"rope_factor": 1.0} if kind == "none" else {"rope_factor": factor, "rope_original_context": 0}
    _, tensors = read_gguf(path)
    divisors = tensors[ROPE_FREQUENCIES].rows(0, tensors[ROPE_FREQUENCIES].shape[0])
    scaling = META_SCALING | {"rope_factor": round(float(divisors.max()), 4)}
    ours = rope_divisors(ModelConfig("gguf", **cast(Settings, {**sizes, **scaling})))
    if divisors.shape != ours.shape or not torch.allclose(divisors, ours, rtol=1e-3):
        raise UserError(f"{path}: {ROPE_FREQUENCIES} is not Llama 3.1's, the only one supported")
    return scaling


def rope_divisors(config: ModelConfig) -> Tensor:
    """The divisor of each rotary frequency: fp32, [E / 2]."""
    return rotary_frequencies(replace(config, rope_factor=1.0)) / rotary_frequencies(config)
