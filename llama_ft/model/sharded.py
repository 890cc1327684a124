"""Tensors of which each process holds its rows, as `torch.distributed.fsdp.fully_shard` splits them; and whole ones.

A tensor that is split is a DTensor. Of R rows each of N processes in turn has R / N, rounded up, and the last ones
fewer, or none.
"""

from typing import Any

import torch
from torch import Tensor


def is_split(tensor: Tensor) -> bool:
    """Whether this process holds rows of it, and other processes the others."""
    return hasattr(tensor, "to_local")  # without an import of DTensor, which a run in one process does not need


def own(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: all of one that is whole."""
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
    """Copy rows to their place, the first of them to row `first`; what other processes hold is left to them."""
    held, start = own(target), own_rows(target).start
    begin, end = max(first, start), min(first + len(rows), start + len(held))
    if begin < end:
        held[begin - start : end - start].copy_(rows[begin - first : end - first])


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every process, all of which have to ask for it at once."""
    full: Tensor = tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined]
    return full


def like(tensor: Tensor, rows: Tensor) -> Tensor:
    """The tensor, whole or split as the given one is, that has these rows here."""
    if not is_split(tensor):
        return rows
    from torch.distributed.tensor import DTensor

    placed: Any = tensor
    return DTensor.from_local(
        rows, placed.device_mesh, placed.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def memory_for(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory on a device for a tensor that is on any, split in the same way; it holds no values yet."""
    shape = getattr(tensor, "_local_tensor", tensor).shape  # without a view, of what has no memory
    return like(tensor, torch.empty(shape, dtype=tensor.dtype, device=device))
