"""Attention: of a batch's rows, or of sequences that lie end to end in one row.

Shapes: B batch, S sequence, T keys, H heads of queries, K heads of keys and values, E head_dim.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Sequences that lie end to end in a row; each attends to itself alone, causally, and has its own positions."""

    lengths: tuple[int, ...]  # tokens of each: numbers of the host, so that nobody has to ask the device
    offsets: Tensor  # int32 [n + 1], where each of the n begins, and where the last one ends

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Segments":
        """Sequences of these lengths; the offsets are on the CPU."""
        return cls(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Segments":
        """The same sequences with another tensor of their offsets, such as one on a device."""
        return replace(self, offsets=change(self.offsets))

    def rotary(self, table: Tensor) -> Tensor:
        """The rows of a rotary table, [positions, E / 2, 2], for positions that start anew in each: [S, E / 2, 2].

        A ValueError if a sequence has more tokens than the table has positions.
        """
        if (longest := max(self.lengths)) > len(table):
            raise ValueError(f"{longest} tokens exceed the model's context of {len(table)}")
        return torch.cat([table[:length] for length in self.lengths])


# Where a query may attend to: bool, broadcast to [B, H, S, T]; the sequences of a packed row; None is causal.
Mask = Tensor | Segments | None


def has_flash(q: Tensor) -> bool:
    """Whether FlashAttention takes such queries: on CUDA in 16 bit, unless it is switched off."""
    return q.is_cuda and q.dtype.itemsize == 2 and torch.backends.cuda.flash_sdp_enabled()


def repeats_keys(q: Tensor, mask: Mask) -> bool:
    """Whether the keys and values that queries share must be repeated, once for each head of queries.

    On CUDA FlashAttention alone takes them as they are, in 16 bit and without a mask. The memory-efficient kernel
    takes everything else once they are repeated; PyTorch by itself would compute and keep S x S scores in fp32
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    return q.is_cuda and (isinstance(mask, Tensor) or not has_flash(q))


def takes_segments(q: Tensor) -> bool:
    """Whether one call of FlashAttention takes all sequences of a packed row; else there is a call for each."""
    return has_flash(q) and has_varlen(q.shape[-1])


def has_varlen(head_dim: int) -> bool:
    """Whether this PyTorch has attention over sequences of any lengths, with a backward pass, for such heads."""
    return head_dim % 8 == 0 and varlen_attention() is not None


@cache
def varlen_attention() -> Callable[..., Tensor] | None:
    """PyTorch's `varlen_attn`, causal and with keys that queries may share; None before PyTorch 2.10."""
    try:  # here: it brings along PyTorch's compiler, which takes seconds to import
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    # Causal is said by `is_causal` in 2.10 and by the window since; without `enable_gqa` shared keys are taken untold.
    wanted: Any = {"window_size": (-1, 0), "is_causal": True, "enable_gqa": True}
    told = {name: value for name, value in wanted.items() if name in known}
    return cast(Callable[..., Tensor], partial(varlen_attn, **told))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, in_one_call: bool = False) -> Tensor:
    """Queries [B, H, S, E], keys and values [B, K, T, E] to [B, S, H, E], all of one dtype; B is 1 under `Segments`.

    `in_one_call` is whether FlashAttention takes `Segments` at once, as `takes_segments` has it.
    """
    if not isinstance(mask, Segments):
        # A single query is the last one, and may attend to all keys. A bool, whatever a compiler makes of lengths.
        causal = True if mask is None and q.shape[2] > 1 else False  # noqa: SIM210
        grouped = k.shape[1] < q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)
    rows = [t.transpose(1, 2) for t in (q, k, v)]  # [1, S, H or K, E], as they lie in memory
    if in_one_call and (varlen := varlen_attention()):
        longest = max(mask.lengths)
        return varlen(*(t.squeeze(0) for t in rows), mask.offsets, mask.offsets, longest, longest).unsqueeze(0)
    # The gradients of a split are put together once; those of slices would each be as long as the row.
    parts = [[part.transpose(1, 2) for part in t.split(mask.lengths, dim=1)] for t in rows]
    return torch.cat([attend(q, k, v, None) for q, k, v in zip(*parts, strict=True)], dim=1)
