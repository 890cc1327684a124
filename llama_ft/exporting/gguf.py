"""Writes a model as a GGUF file, for llama.cpp and programs built on it, a piece of a tensor at a time."""

import math
from pathlib import Path
from typing import Any

import torch

from llama_ft.config import Dtype, ModelConfig
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.exporting.gguf_tokenizer import gguf_tokenizer
from llama_ft.exporting.source import Q8_0_BLOCK, Source
from llama_ft.files import Json
from llama_ft.model.formats import is_rotated
from llama_ft.model.gguf import (
    ARCHITECTURES,
    EMBEDDING,
    KEYS,
    ROPE_FREQUENCIES,
    architecture_of,
    gguf_names,
    gguf_package,
    rope_divisors,
)
from llama_ft.model.stored import in_memory, permuted
from llama_ft.model.writing import as_bytes
from llama_ft.system import Advance, Log

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}


class GgufFile:
    """A GGUF file to be written."""

    def __init__(self, source: Source, tokenizer: Tokenizer, asked: Dtype, log: Log) -> None:
        """Collect the content; a UserError if the format, or the package, cannot express the model."""
        config = source.model
        self._gguf: Any = gguf_package(Path("to=gguf"))
        self._architecture = architecture_of(config)
        in_halves, their_name = ARCHITECTURES[self._architecture].in_halves, gguf_names(config)
        self._weights = {
            their_name(name): permuted(each, config.head_dim, to_hf=True) if in_halves and is_rotated(name) else each
            for name, each in source.weights.items()
        }
        kinds = {name: _TYPES[weight.dtype] for name, weight in self._weights.items()}
        if asked is Dtype.q8_0:
            if rest := list(kinds.values()).count("F16"):
                log(f"{rest} weights are written as F16: their rows are not multiples of {Q8_0_BLOCK}, as Q8_0 needs")
            kinds = {n: "Q8_0" if len(self._weights[n].shape) > 1 and kinds[n] == "F32" else kinds[n] for n in kinds}
        if config.rope_factor != 1 and config.rope_original_context:
            self._weights[ROPE_FREQUENCIES], kinds[ROPE_FREQUENCIES] = in_memory(rope_divisors(config)), "F32"
        self._kinds = {name: self._gguf.GGMLQuantizationType[kind] for name, kind in kinds.items()}
        self._file_type = kinds[EMBEDDING]
        self._metadata = self._sizes(config) | {
            f"tokenizer.{key}": value
            for key, value in gguf_tokenizer(tokenizer, config.vocab_size, config.rope_factor != 1).items()
        }
        self.n_bytes = sum(map(self._n_bytes, self._kinds))

    def write(self, file: Path, advance: Advance) -> None:
        """Write the file; an OSError if that fails."""
        writer = self._gguf.GGUFWriter(file, self._architecture)
        try:
            for key, value in self._metadata.items():
                _add(writer, key, value)
            for name, weight in self._weights.items():
                numbers = torch.zeros(0).numpy().dtype  # not bytes: the shape counts numbers
                writer.add_tensor_info(name, weight.shape, numbers, self._n_bytes(name), self._kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (stream,) = writer.fout  # the package would write whole tensors
            writer.write_padding(stream, stream.tell())
            for name, weight in self._weights.items():
                for _, rows in weight.pieces(1):
                    if self._kinds[name].name == "Q8_0":
                        rows = torch.from_numpy(self._gguf.quants.quantize(rows.numpy(), self._kinds[name]))
                    stream.write(as_bytes(rows))
                    advance(rows.nbytes)
                writer.write_padding(stream, self._n_bytes(name))
        finally:
            writer.close()

    def _n_bytes(self, name: str) -> int:
        block, n_bytes = self._gguf.GGML_QUANT_SIZES[self._kinds[name]]
        return int(math.prod(self._weights[name].shape) // block * n_bytes)

    def _sizes(self, config: ModelConfig) -> Json:
        sizes: Json = {key: getattr(config, ours) for ours, key in KEYS.items()} | {"vocab_size": config.vocab_size}
        sizes |= {key: float(sizes[key]) for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base")}
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            sizes[key] = config.head_dim
        if config.rope_factor != 1 and not config.rope_original_context:
            sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_factor)}
        return {
            "general.type": "model",
            "general.name": config.name,
            "general.file_type": int(self._gguf.LlamaFileType[_FILE_TYPES[self._file_type]]),
            "general.quantization_version": self._gguf.GGML_QUANT_VERSION,
            **{f"{self._architecture}.{key}": value for key, value in sizes.items()},
        }


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    adders.get(type(value), writer.add_array)(key, value)
