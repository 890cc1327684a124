"""Weights that are read or computed a piece at a time, for loading and writing checkpoints."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from llama_ft.model.formats import permute_rotary
from llama_ft.model.mapped import Part, StoredTensor, groups_of_rows
from llama_ft.model.sharded import whole


class Pieces(Protocol):
    """Yields (first row, rows) of a weight, in groups of a multiple of rows, skipping groups without a wanted row.

    Each is valid until the next is requested, and must not be written to: it may be a view of the file.
    """

    def __call__(self, multiple: int, wanted: range | None = None, /) -> Iterator[tuple[int, Tensor]]:
        """`wanted=None` wants all rows."""
        ...


@dataclass(frozen=True)
class Weight:
    """A weight in our layout. Rows are indices into its first dimension."""

    shape: list[int]
    dtype: torch.dtype
    pieces: Pieces

    @property
    def n_bytes(self) -> int:
        """The weight's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def joined(shape: list[int], parts: Sequence[Part]) -> Weight | None:
    """Join one file's tensor, or the tensors of several shards, into a weight of a shape; None if they do not fit.

    Meta's shards are those of its parallel layers: wq, wk, wv, w1, w3 and the output are split by rows, wo and w2 by
    columns, the embeddings by columns (LLaMA 1 and 2) or rows (Llama 3), and norms are repeated. The shapes tell which.
    """
    shapes = [part.shape for part in parts]
    if len({part.dtype for part in parts}) != 1 or any(len(part_shape) != len(shape) for part_shape in shapes):
        return None
    if all(part_shape == shape for part_shape in shapes) and (len(parts) == 1 or len(shape) == 1):
        if isinstance(part := parts[0], StoredTensor):
            return Weight(shape, part.dtype, part.pieces)
        return Weight(shape, part.dtype, partial(_joined_pieces, shape, [part], 0))
    for dim, size in enumerate(shape):
        agree = all(s[:dim] + s[dim + 1 :] == shape[:dim] + shape[dim + 1 :] for s in shapes)
        if agree and sum(s[dim] for s in shapes) == size:
            return Weight(shape, parts[0].dtype, partial(_joined_pieces, shape, parts, dim))
    return None


def _joined_pieces(
    shape: list[int], parts: Sequence[Part], dim: int, multiple: int, wanted: range | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The pieces of a weight split along a dimension among several files."""
    for first, last in groups_of_rows(shape, multiple, wanted):
        rows, start = [], 0  # the first row of each part, where rows are split
        for part in parts:
            if dim:
                rows.append(part.rows(first, last))
            elif first < (stop := start + part.shape[0]) and start < last:
                rows.append(part.rows(max(first, start) - start, min(last, stop) - start))
            start += part.shape[0]
        yield first, torch.cat(rows, dim=dim)


def permuted(weight: Weight, head_dim: int, to_hf: bool) -> Weight:
    """Permute wq or wk to Hugging Face's rotary layout, or from it to ours."""

    def pieces(multiple: int, wanted: range | None = None) -> Iterator[tuple[int, Tensor]]:
        together = math.lcm(multiple, head_dim)
        for first, rows in weight.pieces(together, wanted):
            for start in range(0, len(rows), together):  # so that only a little is copied at a time
                heads = rows[start : start + together]
                if wanted is None or (first + start < wanted.stop and wanted.start < first + start + len(heads)):
                    yield first + start, permute_rotary(heads, len(heads) // head_dim, to_hf)

    return Weight(weight.shape, weight.dtype, pieces)


def in_memory(tensor: Tensor) -> Weight:
    """A tensor on any device, yielded piece by piece on the CPU; a split tensor is gathered first."""

    def pieces(multiple: int, wanted: range | None = None) -> Iterator[tuple[int, Tensor]]:
        gathered = whole(tensor.detach())
        for first, last in groups_of_rows(tensor.shape, multiple, wanted):
            yield first, gathered[first:last].cpu()

    return Weight(list(tensor.shape), tensor.dtype, pieces)


def are_equal(first: Weight, second: Weight) -> bool:
    """Return True if two weights are bitwise equal once the one of the wider dtype is rounded to the other's."""
    if first.shape != second.shape:
        return False
    narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    pairs = zip(first.pieces(1), second.pieces(1), strict=True)
    bits = ([rows.to(narrow).view(torch.uint8) for _, rows in pair] for pair in pairs)
    return all(torch.equal(*pair) for pair in bits)
