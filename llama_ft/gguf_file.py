"""What a GGUF file, llama.cpp's format, says of itself: its metadata, and where its tensors lie.

The gguf package's own reader keeps two arrays for each string, hundreds of MB for Llama 3's vocabulary, and takes many
seconds.
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
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


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
        version = int.from_bytes(content[4:8], "little")
        if content[: len(LFS_POINTER)] == LFS_POINTER:
            raise UserError(f"{path} {LFS_HINT}")
        if content[:4] != GGUF_MAGIC:
            raise UserError(f"{path} is no GGUF file, or is damaged: it does not begin with GGUF")
        if version not in (2, 3):  # of which the third may be big-endian
            form = "big-endian" if version and version % 2**16 == 0 else f"of version {version}"
            raise UserError(f"{path} is {form}: GGUF is read in versions 2 and 3, little-endian")
        try:
            header = _Cursor(content).header()
        except (struct.error, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is damaged, or was not copied completely: its header cannot be read") from error
    if (parts := header.metadata.get("split.count", 1)) != 1:
        raise UserError(f"{path} is one of {parts} parts: put them together with llama.cpp's llama-gguf-split --merge")
    return header


class _Cursor:
    """Reads a header from its start."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at = content, 8

    def header(self) -> Header:
        n_tensors, n_keys = self._numbers("Q", 2)
        metadata = {self._text(): self._value(*self._numbers("I")) for _ in range(n_keys)}
        infos = {self._text(): self._info() for _ in range(n_tensors)}
        alignment = metadata.get("general.alignment", 32)
        start = -(-self._at // max(alignment, 1)) * alignment
        return Header(metadata, {name: info._replace(offset=start + info.offset) for name, info in infos.items()})

    def _info(self) -> TensorInfo:
        dims = self._numbers("Q", *self._numbers("I"))
        return TensorInfo(dims[::-1], *self._numbers("I"), *self._numbers("Q"))

    def _value(self, type_number: int) -> Any:
        if type_number == _STRING:
            return self._text()
        if type_number == _ARRAY:
            (inner,), (length,) = self._numbers("I"), self._numbers("Q")
            return [self._text() for _ in range(length)] if inner == _STRING else self._numbers(_SCALARS[inner], length)
        (value,) = self._numbers(_SCALARS[type_number])
        if type_number == _FLOAT32:  # 1e-5, not 9.999999747378752e-06
            shorter = (float(f"{value:.{digits}g}") for digits in (6, 7, 8))
            return next((short for short in shorter if struct.pack("<f", short) == struct.pack("<f", value)), value)
        return value

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
