"""Attention over the rows of a batch, or over sequences packed end to end in one row.

Shapes: B batch, S sequence, T keys, H query heads, K key/value heads, E head_dim.
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
    """Sequences packed end to end in a row; each attends only to itself, causally, and has its own positions."""

    lengths: tuple[int, ...]  # tokens of each sequence, on the host so that reading them needs no device sync
    offsets: Tensor  # int32 [n + 1], where each of the n sequences begins, and where the last one ends

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Segments":
        """Sequences of these lengths; the offsets are on the CPU."""
        return cls(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Segments":
        """The same sequences with the offsets changed, such as moved to a device."""
        return replace(self, offsets=change(self.offsets))

    def rotary(self, table: Tensor) -> Tensor:
        """The rows of a rotary table, [positions, E / 2, 2], for positions that restart in each: [S, E / 2, 2].

        A ValueError if a sequence has more tokens than the table has positions.
        """
        if (longest := max(self.lengths)) > len(table):
            raise ValueError(f"{longest} tokens exceed the model's context of {len(table)}")
        return torch.cat([table[:length] for length in self.lengths])


# What a query may attend to: a bool tensor broadcast to [B, H, S, T], the sequences of a packed row, or None: causal.
Mask = Tensor | Segments | None


def has_flash(q: Tensor) -> bool:
    """Return True if FlashAttention takes these queries: on CUDA in 16 bit, unless it is switched off."""
    return q.is_cuda and q.dtype.itemsize == 2 and torch.backends.cuda.flash_sdp_enabled()


def repeats_keys(q: Tensor, mask: Mask) -> bool:
    """Return True if shared keys and values must be repeated, once for each query head.

    On CUDA only FlashAttention, in 16 bit and without a mask, takes shared ones. The memory-efficient kernel needs
    them repeated; otherwise PyTorch would fall back to computing and keeping S x S scores in fp32
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    return q.is_cuda and (isinstance(mask, Tensor) or not has_flash(q))


def takes_segments(q: Tensor) -> bool:
    """Return True if one call of FlashAttention takes all sequences of a packed row; else each needs its own call."""
    return has_flash(q) and has_varlen(q.shape[-1])


def has_varlen(head_dim: int) -> bool:
    """Return True if this PyTorch has differentiable variable-length attention for heads of this size."""
    return head_dim % 8 == 0 and varlen_attention() is not None


@cache
def varlen_attention() -> Callable[..., Tensor] | None:
    """PyTorch's `varlen_attn`, causal and with shared keys allowed; None before PyTorch 2.10."""
    try:  # imported here: it pulls in PyTorch's compiler, which takes seconds
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    # PyTorch 2.10 has `is_causal`, later versions the window; versions without `enable_gqa` always allow shared keys.
    wanted: Any = {"window_size": (-1, 0), "is_causal": True, "enable_gqa": True}
    return cast(Callable[..., Tensor], partial(varlen_attn, **{name: wanted[name] for name in wanted if name in known}))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, in_one_call: bool = False) -> Tensor:
    """Queries [B, H, S, E], keys and values [B, K, T, E] to [B, S, H, E], all of one dtype; B is 1 under `Segments`.

    `in_one_call`: FlashAttention takes all `Segments` at once (see `takes_segments`).
    """
    if not isinstance(mask, Segments):
        # A single query is the last one and may attend to all keys. Must be a bool even if a compiler traces lengths.
        causal = True if mask is None and q.shape[2] > 1 else False  # noqa: SIM210
        grouped = k.shape[1] < q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)
    rows = [t.transpose(1, 2) for t in (q, k, v)]  # [1, S, H or K, E], their layout in memory
    if in_one_call and (varlen := varlen_attention()):
        longest = max(mask.lengths)
        return varlen(*(t.squeeze(0) for t in rows), mask.offsets, mask.offsets, longest, longest).unsqueeze(0)
    # The backward pass of a split joins the gradients once; that of each slice would make one as long as the row.
    parts = [[part.transpose(1, 2) for part in t.split(mask.lengths, dim=1)] for t in rows]
    return torch.cat([attend(q, k, v, None) for q, k, v in zip(*parts, strict=True)], dim=1)
