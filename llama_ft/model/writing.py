"""Writes checkpoint files a piece at a time, so that no more than one piece is in memory.

safetensors' own writer needs whole tensors, torch.save all tensors of a file.
"""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from llama_ft.model.mapped import MOMENTS_DTYPES, PTH_STORAGES, SAFETENSORS_DTYPES
from llama_ft.model.stored import Weight
from llama_ft.system import Advance

W = TypeVar("W", Weight, Tensor)
PTH_ALIGNMENT = 64  # of a tensor's data, in bytes, as in torch.save


def in_order(weights: Mapping[str, W]) -> list[tuple[str, W]]:
    """Weights in their order in a safetensors file: the widest dtypes first, so that all are aligned."""
    return sorted(weights.items(), key=lambda item: -item[1].dtype.itemsize)


def write_safetensors(
    file: Path, weights: Mapping[str, Weight], advance: Advance, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file (the format is at `read_safetensors`); an OSError if it cannot be written."""
    names = {dtype: name for name, dtype in (SAFETENSORS_DTYPES | MOMENTS_DTYPES).items()}
    ordered = in_order(weights)
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
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


class _Data(NamedTuple):
    """Stands in for a tensor's data while the tensor is pickled."""

    dtype: torch.dtype
    n_elements: int


class _Pickler(pickle.Pickler):
    """Pickles meta tensors as torch.save does (PyTorch's "Serialization semantics"), naming their data 0, 1, 2 …"""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)
        self._keys = count()

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        data, shape = _Data(value.dtype, value.numel()), tuple(value.shape)
        return torch._utils._rebuild_tensor_v2, (data, 0, shape, value.stride(), False, OrderedDict())

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        if not isinstance(value, _Data):
            return None
        return "storage", getattr(torch, PTH_STORAGES[value.dtype]), str(next(self._keys)), "cpu", value.n_elements


class PthFile:
    """A file in torch.save's format, whose tensors are written one after the other."""

    def __init__(self, file: Path, weights: dict[str, Tensor]) -> None:
        """Write everything before the data, given the weights as meta tensors."""
        self._keys = {name: index for index, name in enumerate(weights)}
        _Pickler(pickled := io.BytesIO()).dump(weights)
        self._archive = zipfile.ZipFile(file, "w")
        for name, content in (("data.pkl", pickled.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            self._archive.writestr(f"archive/{name}", content)

    def close(self) -> None:
        """Write the archive's directory, which completes the file."""
        self._archive.close()

    @contextmanager
    def tensor(self, name: str) -> Iterator[IO[bytes]]:
        """A stream for a tensor's bytes, all written before the next tensor's."""
        info = zipfile.ZipInfo(f"archive/data/{self._keys[name]}")
        assert self._archive.fp is not None
        # Before the data come 30 bytes, the name, 20 bytes for large files, and 4 for the length of the padding.
        n_skipped = -(self._archive.fp.tell() + 30 + len(info.filename) + 20 + 4) % PTH_ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", n_skipped) + b"Z" * n_skipped
        with self._archive.open(info, "w", force_zip64=True) as stream:
            yield stream


def as_bytes(rows: Tensor) -> memoryview:
    """View a tensor's bytes."""
    flat: Any = rows.contiguous().view(torch.uint8).flatten().numpy()
    return memoryview(flat)
