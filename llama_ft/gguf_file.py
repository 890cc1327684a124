"""What a GGUF file, llama.cpp's format, says of itself: its metadata, and where its tensors lie.

The gguf package's own reader keeps four arrays for each string: for Llama 3's vocabulary it takes many seconds, and it
takes what is damaged for something else.
"""

import mmap
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from llama_ft.config import GGUF_MAGIC, UserError
from llama_ft.files import LFS_HINT, LFS_POINTER, explained, regular

# By the numbers of types in the format's description, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
VERSIONS = (2, 3)  # they differ in that a file of version 3 may be big-endian


class TensorInfo(NamedTuple):
    """A tensor in the file."""

    shape: list[int]  # the last dimension lies together, as in PyTorch
    type_number: int
    offset: int  # of its first byte in the file


class Header(NamedTuple):
    """A file's metadata by key, and its tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read a file's header; a UserError if it is damaged, a part of a model, or in a form that is not read."""
    with explained(f"{path} cannot be read"):
        state = regular(path).stat()
        return _read(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1)  # sizes, tokenizer and weights are read one after the other
def _read(path: Path, size: int, _changed: int) -> Header:
    if not size:
        raise UserError(f"{path} is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _check_form(path, content)
        try:
            header = _Cursor(content).header()
        except (struct.error, ValueError, KeyError, OverflowError) as error:
            raise UserError(f"{path} is damaged, or was not copied completely: its header cannot be read") from error
    if (parts := header.metadata.get("split.count", 1)) != 1:
        raise UserError(f"{path} is one of {parts} parts: put them together with llama.cpp's llama-gguf-split --merge")
    return header


def _check_form(path: Path, content: mmap.mmap) -> None:
    if content[: len(LFS_POINTER)] == LFS_POINTER:
        raise UserError(f"{path} {LFS_HINT}")
    version = int.from_bytes(content[4:8], "little")
    if content[:4] != GGUF_MAGIC:
        raise UserError(f"{path} is no GGUF file, or is damaged: it does not begin with GGUF")
    if version and not version % 2**16:
        raise UserError(f"{path} is a big-endian GGUF file, which is not read")
    if version not in VERSIONS:
        raise UserError(f"{path} is a GGUF file of version {version}: only {VERSIONS[0]} and {VERSIONS[1]} are read")


class _Cursor:
    """Reads a header from its start."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at = content, 8

    def header(self) -> Header:
        n_tensors, n_keys = self._numbers("Q", 2)
        metadata = {}
        for _ in range(n_keys):
            key, (type_number,) = self._text(), self._numbers("I")
            metadata[key] = self._value(type_number)
        infos = {self._text(): self._info() for _ in range(n_tensors)}
        alignment = metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment if alignment else self._at
        return Header(metadata, {name: info._replace(offset=start + info.offset) for name, info in infos.items()})

    def _info(self) -> TensorInfo:
        (n_dims,) = self._numbers("I")
        dims = self._numbers("Q", n_dims)
        (type_number,), (offset,) = self._numbers("I"), self._numbers("Q")
        return TensorInfo(list(reversed(dims)), type_number, offset)

    def _value(self, type_number: int) -> Any:
        if type_number == _STRING:
            return self._text()
        if type_number == _FLOAT32:  # 1e-5, not 9.999999747378752e-06
            (number,) = self._numbers("f")
            shorter = (float(f"{number:.{digits}g}") for digits in (6, 7, 8))
            return next((short for short in shorter if struct.pack("<f", short) == struct.pack("<f", number)), number)
        if type_number != _ARRAY:
            return self._numbers(_SCALARS[type_number])[0]
        (inner,), (length,) = self._numbers("I"), self._numbers("Q")
        return [self._text() for _ in range(length)] if inner == _STRING else self._numbers(_SCALARS[inner], length)

    def _numbers(self, code: str, count: int = 1) -> list[Any]:
        layout = f"<{count}{code}"
        numbers = struct.unpack_from(layout, self._content, self._at)
        self._at += struct.calcsize(layout)
        return list(numbers)

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        text = self._content[self._at : self._at + length]
        if len(text) != length:
            raise ValueError("a text reaches beyond the file")
        self._at += length
        return text.decode(errors="replace")
