"""What kernels on CUDA keep or take that those of fake CPU tensors do not."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ROW_BLOCK, HEAD_BLOCK = 128, 32  # to whose multiples FlashAttention rounds lengths and head sizes


def use_fused_dropout(model: nn.Module) -> None:
    """Keep a mask of one byte a value, as the kernel on CUDA does; on the CPU the mask has the values' dtype."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0]  # type: ignore[method-assign, misc]


class FlashAttentionMemory(TorchDispatchMode):
    """What FlashAttention's backward pass takes while it runs, to be entered after the tracker that is to see it.

    After mha_bwd (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp): fp32 sums of the queries' gradients
    and of each row, and the gradients of grouped keys and values once for each query head.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator, and hold that memory until it has returned."""
        taken = _taken(*args[1:3]) if func is FLASH_BACKWARD else []
        out = func(*args, **(kwargs or {}))
        del taken
        return out


def _taken(q: Tensor, k: Tensor) -> list[Tensor]:
    """Tensors of that size. Queries are [B, heads, S, head_dim], keys [B, kv heads, S, head_dim]."""
    n_rows, heads, length, size = q.shape
    head_block = HEAD_BLOCK if size <= 128 else 2 * HEAD_BLOCK
    length, size = -(-length // ROW_BLOCK) * ROW_BLOCK, -(-size // head_block) * head_block
    sums = [torch.empty(n_rows, heads, length), torch.empty(n_rows, heads, length, size)]
    return sums if k.shape[1] == heads else [*sums, torch.empty_like(q), torch.empty_like(q)]
