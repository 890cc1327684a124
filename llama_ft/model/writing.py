"""Checkpoint files written a piece of a tensor at a time, so that no more than a piece is in memory.

safetensors' own writer takes whole tensors, torch.save a whole file's.
"""

import errno
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llama_ft.model.mapped import SAFETENSORS_DTYPES, StoredTensor, read_pth
from llama_ft.model.stored import Weight

Advance = Callable[[int], None]  # called with how many more bytes are written


def write_safetensors(file: Path, weights: Mapping[str, Weight], advance: Advance) -> None:
    """Write a safetensors file, in which the widest numbers come first, so that all are aligned as in safetensors' own.

    The format: 8 bytes, the header's length, little-endian; the header in JSON; the tensors' bytes without gaps.
    (https://huggingface.co/docs/safetensors)

    Raises:
        OSError: if it cannot be written.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    ordered = sorted(weights.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, weight in ordered:
        place = [start, start := start + weight.n_bytes]
        header[name] = {"dtype": names[weight.dtype], "shape": weight.shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, weight in ordered:
            for _, rows in weight.pieces(1):
                stream.write(as_bytes(rows))
                advance(rows.nbytes)


class PthFile:
    """A file as torch.save writes it, whose tensors are filled in row by row."""

    def __init__(self, file: Path, weights: Mapping[str, tuple[list[int], torch.dtype]]) -> None:
        """Write the file with all that is not data.

        Args:
            weights: shape and dtype by name.

        Raises:
            OSError: if it cannot be written.
        """
        # torch knows the format and leaves the data out; where in the file they go our reader knows.
        with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
            fake = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in weights.items()}
            try:
                torch.save(fake, file)
            except RuntimeError as error:  # what its writer in C++ makes of a full disk
                raise OSError(errno.EIO, next(iter(str(error).splitlines()), "torch.save failed")) from error
        self._places: dict[str, StoredTensor] = read_pth(file)
        self._checksums = {place.offset: 0 for place in self._places.values()}
        self._stream = file.open("r+b")

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Fill in a tensor's rows from the first on. Those of one tensor must be given in their order.

        Raises:
            OSError: if they cannot be written.
        """
        place, data = self._places[name], as_bytes(rows)
        self._stream.seek(place.offset + first * place.row_bytes)
        self._stream.write(data)
        self._checksums[place.offset] = zlib.crc32(data, self._checksums[place.offset])

    def close(self) -> None:
        """Write the checksums: torch does not look at them, readers that unzip the file do.

        Raises:
            OSError: if they cannot be written.
        """
        with self._stream as stream, zipfile.ZipFile(stream) as archive:
            entry = archive.start_dir
            for info in archive.infolist():
                stream.seek(entry)
                (n_name, n_extra, n_comment) = struct.unpack("<28x3H", stream.read(34))
                data = _data_offset(stream, info)
                if (checksum := self._checksums.get(data)) is not None and info.file_size:
                    _write_at(stream, entry + 16, struct.pack("<L", checksum))
                    descriptor = data + info.file_size  # after the data: its signature, then the checksum
                    _write_at(stream, descriptor + 4, struct.pack("<L", checksum))
                entry += 46 + n_name + n_extra + n_comment


def _data_offset(stream: IO[bytes], info: zipfile.ZipInfo) -> int:
    stream.seek(info.header_offset)
    n_name, n_extra = struct.unpack("<26x2H", stream.read(30))
    return info.header_offset + 30 + int(n_name) + int(n_extra)


def _write_at(stream: IO[bytes], offset: int, data: bytes) -> None:
    stream.seek(offset)
    stream.write(data)


def as_bytes(rows: Tensor) -> memoryview:
    """A tensor's bytes."""
    flat: Any = rows.contiguous().view(torch.uint8).flatten().numpy()
    return memoryview(flat)
