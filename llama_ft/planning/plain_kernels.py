"""Plans other programs' runs: norms, SwiGLU and loss operator by operator, differentiated by PyTorch.

Our own keep less for the backward pass. LitGPT's do the same as these, and so do transformers' by default.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ft.data.collate import Batch
from llama_ft.kernels import at_least_fp32
from llama_ft.model.four_bit import FourBitLinear, FrozenProduct
from llama_ft.model.transformer import FeedForward, RMSNorm
from llama_ft.training import step


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Compute as other programs do, inside the block."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(step, "summed_loss", _loss))
        stack.enter_context(patch.object(FrozenProduct, "forward", _keep_input))
        stack.enter_context(patch.object(RMSNorm, "forward", _norm))
        stack.enter_context(patch.object(FeedForward, "forward", _feed_forward))
        yield


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """As `summed_loss`, with PyTorch's cross-entropy."""
    logits = model(batch.tokens, mask=batch.segments, logits_at=batch.target_positions)
    return F.cross_entropy(at_least_fp32(logits), batch.targets, reduction="sum")


def _norm(self: RMSNorm, x: Tensor) -> Tensor:
    """As `RMSNorm.forward`, operator by operator."""
    x_fp32 = at_least_fp32(x)
    return (x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def _feed_forward(self: FeedForward, x: Tensor) -> Tensor:
    """As `FeedForward.forward`, operator by operator."""
    return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


def _keep_input(ctx: Any, x: Tensor, layer: FourBitLinear) -> Tensor:
    """As `FrozenProduct.forward`, but keep x too, as bitsandbytes did before pull request 1270 of July 2024."""
    ctx.layer, ctx.kept = layer, x
    return F.linear(x, layer.dense_weight(x.dtype), layer.bias)
