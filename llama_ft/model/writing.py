"""Checkpoint files written a piece of a tensor at a time, so that no more than a piece is in memory.

safetensors' own writer takes whole tensors, torch.save a whole file's.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from llama_ft.model.mapped import SAFETENSORS_DTYPES
from llama_ft.model.stored import Weight

Advance = Callable[[int], None]  # called with how many more bytes are written
PTH_ALIGNMENT = 64  # bytes, of a tensor's data, as torch.save has it


def write_safetensors(file: Path, weights: Mapping[str, Weight], advance: Advance) -> None:
    """Write a safetensors file (the format is at `read_safetensors`); an OSError if it cannot be written.

    The widest numbers come first, so that all are aligned as in safetensors' own.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    ordered = sorted(weights.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, weight in ordered:
        offsets = [start, start := start + weight.n_bytes]
        header[name] = {"dtype": names[weight.dtype], "shape": weight.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, weight in ordered:
            for _, rows in weight.pieces(1):
                stream.write(as_bytes(rows))
                advance(rows.nbytes)


class _StorageId(tuple[object, ...]):
    """Stands for the data of a tensor while the tensor is pickled."""


class _Tensor:
    """Pickled as torch.save pickles a tensor, by PyTorch's "Serialization semantics"; the key names its data."""

    _STORAGES: ClassVar = {
        torch.float64: torch.DoubleStorage,
        torch.float32: torch.FloatStorage,
        torch.float16: torch.HalfStorage,
        torch.bfloat16: torch.BFloat16Storage,
    }

    def __init__(self, key: str, shape: list[int], dtype: torch.dtype) -> None:
        self.storage = _StorageId(("storage", self._STORAGES[dtype], key, "cpu", math.prod(shape)))
        self.shape = tuple(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        stride = tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        return tuple(value) if isinstance(value, _StorageId) else None


class PthFile:
    """A file as torch.save writes it, whose tensors' data are written one after the other."""

    def __init__(self, file: Path, weights: Mapping[str, tuple[list[int], torch.dtype]]) -> None:
        """Write all that comes before the data, given each weight's shape and dtype."""
        self._keys = {name: str(index) for index, name in enumerate(weights)}
        _Pickler(pickled := io.BytesIO(), protocol=2).dump({n: _Tensor(self._keys[n], *weights[n]) for n in weights})
        self._archive = zipfile.ZipFile(file, "w")
        for name, content in (("data.pkl", pickled.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            self._archive.writestr(f"archive/{name}", content)

    def close(self) -> None:
        """Write the list of what the file holds, which makes it whole."""
        self._archive.close()

    @contextmanager
    def tensor(self, name: str) -> Iterator[IO[bytes]]:
        """Where a tensor's bytes are written, all before the next tensor's."""
        info = zipfile.ZipInfo(f"archive/data/{self._keys[name]}")
        assert self._archive.fp is not None
        # Before the data come 30 bytes, the name, 20 bytes for large files, and 4 that say how much is skipped.
        n_skipped = -(self._archive.fp.tell() + 30 + len(info.filename) + 20 + 4) % PTH_ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", n_skipped) + b"Z" * n_skipped
        with self._archive.open(info, "w", force_zip64=True) as stream:
            yield stream


def as_bytes(rows: Tensor) -> memoryview:
    """A tensor's bytes."""
    flat: Any = rows.contiguous().view(torch.uint8).flatten().numpy()
    return memoryview(flat)
