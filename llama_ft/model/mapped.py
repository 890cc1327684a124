"""Tensors in checkpoint files, mapped into memory: found by name, read a piece at a time.

Files are mapped read-only, and a piece's pages are given back once it has been copied. The mappings that torch and
safetensors make are private and writable: what was read stays resident beside its copy, and all of the file counts
against a limit on the process's data segment.
"""

import json
import math
import mmap
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ft.config import UserError

PIECE_BYTES = 16 * 2**20
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class MappedFile:
    """A file in memory, and the bytes from `start` on."""

    path: Path
    pages: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> "MappedFile":
        """Map a file.

        Raises:
            UserError: if it cannot be read or is empty.
        """
        try:
            with path.open("rb") as file:
                return cls(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError as error:
            raise UserError(f"{path} is empty") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def give_back(self, start: int, stop: int) -> None:
        """Let the system drop the pages that lie within these bytes; they are read again if they are needed again."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED, first, last - first)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file. Rows are indices into its first dimension."""

    file: MappedFile
    offset: int  # of its first byte
    dtype: torch.dtype
    shape: list[int]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) over the whole tensor, in groups of a multiple of rows; valid until the next is asked for.

        The tensors are views of the file: they must not be written to.
        """
        step = max(1, PIECE_BYTES // (self.row_bytes * multiple)) * multiple
        for first in range(0, self.shape[0], step):
            rows = min(step, self.shape[0] - first)
            start = self.offset + first * self.row_bytes
            n_elements = rows * math.prod(self.shape[1:])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                flat = torch.frombuffer(self.file.pages, dtype=self.dtype, count=n_elements, offset=start)
            yield first, flat.view(rows, *self.shape[1:])
            self.file.give_back(start, start + rows * self.row_bytes)


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Nothing but the header is read.

    The format: 8 bytes, the header's length, little-endian; the header in JSON; the tensors' bytes.
    (https://huggingface.co/docs/safetensors)

    Raises:
        UserError: if the file is damaged or cut short, or a tensor is not floating-point.
    """
    file = MappedFile.open(path)
    size = len(file.pages)
    begin = 8 + int.from_bytes(file.pages[:8], "little")
    try:
        if begin > size:
            raise ValueError
        header: dict[str, Any] = json.loads(file.pages[8:begin])
        metadata: dict[str, str] = header.pop("__metadata__", {})
        entries = {name: (e["dtype"], [int(n) for n in e["shape"]], *e["data_offsets"]) for name, e in header.items()}
        end = begin + max((stop for _, _, _, stop in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file, or is damaged: its header cannot be read") from error
    if end != size:
        raise UserError(f"{path} is {size:,} bytes long, but its header says {end:,}: {_cut_short(size < end)}")
    tensors = {}
    for name, (dtype, shape, start, stop) in entries.items():
        if dtype not in _SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name} is stored as {dtype}; only {', '.join(_SAFETENSORS_DTYPES)} can be read")
        tensors[name] = StoredTensor(file, begin + start, _SAFETENSORS_DTYPES[dtype], shape)
        if stop - start != tensors[name].n_bytes or start < 0:
            raise UserError(
                f"{path} is damaged: {name} should take {tensors[name].n_bytes:,} bytes, not {stop - start:,}"
            )
    return tensors, metadata


def read_pth(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file of `torch.save` by name. No code in it is run, and no tensor is read.

    Raises:
        UserError: if the file is damaged or cut short, or holds something else than floating-point tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    file = MappedFile.open(path)
    if file.pages[:2] != b"PK":
        raise UserError(f"{path} is not in PyTorch's zip format: it is damaged, or was saved before PyTorch 1.6")
    try:
        # PyTorch's documented way to the places of tensors in a file ("Serialization semantics").
        with FakeTensorMode():
            loaded = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, and is not loaded: it could run any code") from error
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is damaged or cut short: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(f"{path} is not a checkpoint: it must hold tensors by name")
    tensors = {}
    for name, fake in loaded.items():
        if not fake.is_floating_point() or fake.dtype not in _SAFETENSORS_DTYPES.values() or not fake.is_contiguous():
            raise UserError(f"{path}: {name} is {fake.dtype}, or not contiguous; that cannot be read")
        offset = fake.untyped_storage()._checkpoint_offset + fake.storage_offset() * fake.dtype.itemsize
        tensors[name] = StoredTensor(file, offset, fake.dtype, list(fake.shape))
    return tensors


def _cut_short(shorter: bool) -> str:
    return "it was not downloaded or copied completely" if shorter else "it is damaged"
