"""Tensors split by rows among processes, as by `torch.distributed.fsdp.fully_shard`, and whole ones.

A split tensor is a DTensor. Each of N processes holds R / N of the R rows, rounded up; the last ones fewer, or none.
"""

from typing import Any

import torch
from torch import Tensor


def is_split(tensor: Tensor) -> bool:
    """Return True if the tensor's rows are split among processes."""
    return hasattr(tensor, "to_local")  # avoids importing DTensor, which a run in one process does not need


def own(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: all of them if it is whole."""
    local: Tensor = tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]
    return local


def own_rows(tensor: Tensor) -> range:
    """The indices of the rows that this process holds."""
    if not is_split(tensor):
        return range(len(tensor))
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    first = min(len(tensor), int(mesh.get_local_rank()) * -(-len(tensor) // int(mesh.size())))
    return range(first, first + len(own(tensor)))


def write_rows(target: Tensor, first: int, rows: Tensor) -> None:
    """Copy rows to `first` and after, skipping the rows that other processes hold."""
    held, start = own(target), own_rows(target).start
    begin, end = max(first, start), min(first + len(rows), start + len(held))
    if begin < end:
        held[begin - start : end - start].copy_(rows[begin - first : end - first])


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every process; all processes must call this together."""
    full: Tensor = tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined]
    return full


def like(tensor: Tensor, rows: Tensor) -> Tensor:
    """Wrap this process's rows as a tensor that is whole, or split, like the given one."""
    if not is_split(tensor):
        return rows
    from torch.distributed.tensor import DTensor

    placed: Any = tensor
    return DTensor.from_local(
        rows, placed.device_mesh, placed.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def memory_for(tensor: Tensor, device: torch.device) -> Tensor:
    """Uninitialized memory on a device for a tensor on any device, split in the same way."""
    shape = getattr(tensor, "_local_tensor", tensor).shape  # to_local() would make a view, which needs memory
    return like(tensor, torch.empty(shape, dtype=tensor.dtype, device=device))
