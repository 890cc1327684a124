"""The header of a GGUF file, llama.cpp's format: its metadata, and the positions of its tensors.

The gguf package's own reader keeps two arrays for each string: for Llama 3's vocabulary it takes 7 s and 670 MB at each
start of a command, and this reader 0.2 s and 60 MB.
"""

import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from llama_ft.config import UserError
from llama_ft.config.source import GGUF_MAGIC
from llama_ft.files import LFS_HINT, LFS_POINTER, explained, regular

# By the type numbers of the format's description, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


class TensorInfo(NamedTuple):
    """A tensor in the file."""

    shape: list[int]  # the last dimension is contiguous, as in PyTorch
    type_number: int
    offset: int  # of its first byte in the file


class Header(NamedTuple):
    """A file's metadata by key, and its tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read a file's header; a UserError if it is damaged, one part of a model, or in an unsupported form."""
    with explained(f"{path} cannot be read"):
        state = regular(path).stat()
        return _read(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1)  # sizes, tokenizer and weights are read one after the other
def _read(path: Path, _size: int, _changed: int) -> Header:
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise UserError(f"{path} {LFS_HINT}")
        if not start.startswith(GGUF_MAGIC):
            raise UserError(f"{path} is not a GGUF file, or is damaged: it does not begin with GGUF")
        if int.from_bytes(start[4:8], "little") not in (2, 3):
            raise UserError(f"{path} is big-endian, or of an unsupported version: GGUF is read in versions 2 and 3")
        file.seek(8)
        try:
            header = _header(file)
        except (struct.error, ValueError, LookupError, TypeError, ArithmeticError, MemoryError) as error:
            raise UserError(f"{path} is damaged, or was not copied completely: its header cannot be read") from error
    if (parts := header.metadata.get("split.count", 1)) != 1:
        raise UserError(f"{path} is one of {parts} parts: merge them with llama.cpp's llama-gguf-split --merge")
    return header


def _header(file: IO[bytes]) -> Header:
    n_tensors, n_keys = _numbers(file, "Q", 2)
    metadata = {_text(file): _value(file, *_numbers(file, "I")) for _ in range(n_keys)}
    infos = {_text(file): _info(file) for _ in range(n_tensors)}
    alignment = metadata.get("general.alignment", 32)
    start = -(-file.tell() // alignment) * alignment
    return Header(metadata, {name: info._replace(offset=start + info.offset) for name, info in infos.items()})


def _info(file: IO[bytes]) -> TensorInfo:
    dims = _numbers(file, "Q", *_numbers(file, "I"))
    return TensorInfo(dims[::-1], *_numbers(file, "I"), *_numbers(file, "Q"))


def _value(file: IO[bytes], type_number: int) -> Any:
    if type_number == _STRING:
        return _text(file)
    if type_number == _ARRAY:
        (inner,), (length,) = _numbers(file, "I"), _numbers(file, "Q")
        return [_text(file) for _ in range(length)] if inner == _STRING else _numbers(file, _SCALARS[inner], length)
    (value,) = _numbers(file, _SCALARS[type_number])
    return float(f"{value:.7g}") if type_number == _FLOAT32 else value  # 1e-5, not 9.999999747378752e-06


def _numbers(file: IO[bytes], code: str, count: int = 1) -> list[Any]:
    layout = f"<{count}{code}"
    return list(struct.unpack(layout, file.read(struct.calcsize(layout))))


def _text(file: IO[bytes]) -> str:
    (length,) = _numbers(file, "Q")
    return file.read(length).decode(errors="replace")
