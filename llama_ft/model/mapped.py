"""Tensors in memory-mapped checkpoint files: found by name, read a piece at a time.

Files are mapped read-only, and a piece's pages are released once it has been copied. torch's and safetensors' mappings
are private and writable: pages once read stay resident next to their copy, and the whole file counts against a limit on
the process's data segment.
"""

import json
import math
import mmap
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_ft.config import UserError
from llama_ft.files import LFS_HINT, LFS_POINTER, explained, regular

PIECE_ELEMENTS = 2**20  # 4 MiB in fp32; counted in elements so that pieces do not depend on the dtype
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOMENTS_DTYPES = {"U8": torch.uint8}  # of optimizers with moments in 8 bits
PTH_STORAGES = {  # classes of PyTorch
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
}


class StoredTensor(NamedTuple):
    """A tensor's place in a file. Rows are indices into its first dimension."""

    file: mmap.mmap
    offset: int  # of its first byte
    dtype: torch.dtype
    shape: list[int]

    @property
    def n_bytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self, multiple: int = 1, wanted: range | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) in groups of a multiple of rows, each valid until the next is requested.

        Groups without a wanted row are skipped. The tensors are views of the file: do not write to them.
        """
        for first, last in groups_of_rows(self.shape, multiple, wanted):
            yield first, self._view(first, last)
            self._give_back(first, last)

    def rows(self, first: int, last: int) -> Tensor:
        """Copy these rows."""
        copy = self._view(first, last).clone()
        self._give_back(first, last)
        return copy

    def _view(self, first: int, last: int) -> Tensor:
        shape = (last - first, *self.shape[1:])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self.file, dtype=self.dtype, count=math.prod(shape), offset=self._offset_of(first))
        return flat.view(shape)

    def _give_back(self, first: int, last: int) -> None:
        """Let the system drop the pages within these rows; they are read again when needed."""
        start = -(-self._offset_of(first) // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = self._offset_of(last) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _offset_of(self, row: int) -> int:
        return self.offset + row * math.prod(self.shape[1:]) * self.dtype.itemsize


class QuantizedTensor(NamedTuple):
    """A tensor's place in a file that quantizes numbers in blocks within a row; they are read as fp32."""

    raw: StoredTensor  # uint8, [..., bytes of a row]
    shape: list[int]
    kind: Any  # a GGMLQuantizationType of the package gguf
    quants: Any  # its module of that name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as read."""
        return torch.float32

    def rows(self, first: int, last: int) -> Tensor:
        """Dequantize these rows."""
        return torch.from_numpy(self.quants.dequantize(self.raw.rows(first, last).numpy(), self.kind))


Part = StoredTensor | QuantizedTensor  # a weight, or a shard of it


def mapped(path: Path) -> mmap.mmap:
    """Map a file; a UserError if it cannot be read or is empty."""
    with explained(f"{path} cannot be read"), regular(path).open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise UserError(f"{path} is empty") from error


def groups_of_rows(shape: Sequence[int], multiple: int, wanted: range | None = None) -> Iterator[tuple[int, int]]:
    """(first, last) of each piece of a tensor that contains wanted rows; None wants all."""
    step = max(1, PIECE_ELEMENTS // (math.prod(shape[1:]) * multiple)) * multiple
    wanted = range(shape[0]) if wanted is None else wanted
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        if first < wanted.stop and wanted.start < last:
            yield first, last


def read_safetensors(
    path: Path, dtypes: Mapping[str, torch.dtype] = SAFETENSORS_DTYPES
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Only the header is read.

    The format: the header's length in 8 bytes, little-endian; the header in JSON; the tensors' bytes without gaps
    (https://huggingface.co/docs/safetensors). A damaged file or a tensor of another dtype is a UserError.
    """
    file = mapped(path)
    if file[: len(LFS_POINTER)] == LFS_POINTER:
        raise UserError(f"{path} {LFS_HINT}")
    size, begin = len(file), 8 + int.from_bytes(file[:8], "little")
    try:
        if begin > size:
            raise ValueError("the header's length is larger than the file")
        header = json.loads(file[8:begin])
        metadata: dict[str, str] = header.pop("__metadata__", {})
        entries = {name: (entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file, or is damaged: its header cannot be read") from error
    end = begin + max((stop for *_, stop in entries.values()), default=0)
    if end != size:
        reason = "it was not downloaded or copied completely" if size < end else "it is damaged"
        raise UserError(f"{path} is {size:,} bytes long, but its header says {end:,}: {reason}")
    tensors = {}
    for name, (dtype, shape, start, stop) in entries.items():
        if dtype not in dtypes:
            allowed = ", ".join(dtypes)
            raise UserError(f"{path}: {name} is stored as {dtype}; only {allowed} can be read")
        stored = StoredTensor(file, begin + start, dtypes[dtype], shape)
        if stop - start != stored.n_bytes:
            raise UserError(f"{path} is damaged: {name} has {stop - start:,} bytes, but its shape is {shape}")
        tensors[name] = stored
    return tensors, metadata


def read_pth(path: Path) -> dict[str, StoredTensor]:
    """Find the tensors of a `torch.save` file by name, running no code; a UserError if it is damaged or not one."""
    file = mapped(path)
    if file[:2] != b"PK":
        raise UserError(f"{path} is not in PyTorch's zip format: it is damaged, or was saved before PyTorch 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _TensorUnpickler(file, archive).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not loaded: {error}") from error
    except Exception as error:  # zipfile and pickle do not bound what damaged data makes them raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is damaged or cut short: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, StoredTensor) for tensor in tensors.values()):
        raise UserError(f"{path} is not a checkpoint: it must hold tensors by name")
    return tensors


class _TensorUnpickler(pickle.Unpickler):
    """Finds a file's tensors. The format is in PyTorch's documentation, "Serialization semantics".

    torch.load on fake tensors would work too, but takes seconds to start and crashes on big-endian files.
    """

    def __init__(self, file: mmap.mmap, archive: zipfile.ZipFile) -> None:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("/data.pkl")), "")
        self._file, self._archive, self._folder = file, archive, pickled.removesuffix("data.pkl")
        is_stored = all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())  # else a zip bomb
        byteorder = f"{self._folder}byteorder"
        if not pickled or not is_stored or (byteorder in names and archive.read(byteorder) != b"little"):
            raise ValueError("it is not little-endian and uncompressed, as torch.save writes files")
        super().__init__(archive.open(pickled))

    def find_class(self, module: str, name: str) -> Any:
        """Map a pickled name to a stand-in. Nothing is imported, and an unknown name is an error."""
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            **{f"torch.{storage}": dtype for dtype, storage in PTH_STORAGES.items()},
        }
        if f"{module}.{name}" not in known:
            allowed = ", ".join(SAFETENSORS_DTYPES)
            raise pickle.UnpicklingError(f"it holds {module}.{name}, but may only hold tensors of {allowed}")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int, int]:
        """The dtype of a tensor's data, and where the data begin and end."""
        _, dtype, key, _, _ = pid
        info = self._archive.getinfo(f"{self._folder}data/{key}")
        n_name, n_extra = struct.unpack_from(local_header := "<26x2H", self._file, info.header_offset)
        start = info.header_offset + struct.calcsize(local_header) + n_name + n_extra
        return dtype, start, min(start + info.file_size, len(self._file))

    def _tensor(
        self, storage: tuple[torch.dtype, int, int], first: int, shape: Sequence[int], stride: Sequence[int], *_: Any
    ) -> StoredTensor:
        dtype, start, stop = storage
        contiguous = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        if any(n > 1 and here != there for n, here, there in zip(shape, stride, contiguous, strict=True)):
            raise pickle.UnpicklingError(f"it holds a tensor {list(shape)} that is not contiguous: not supported")
        stored = StoredTensor(self._file, start + first * dtype.itemsize, dtype, list(shape))
        if stored.offset + stored.n_bytes > stop:
            raise ValueError(f"a tensor {list(shape)} reaches beyond its data")
        return stored
