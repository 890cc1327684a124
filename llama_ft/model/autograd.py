"""Functions that keep less for their backward pass than PyTorch's, with no more passes over memory.

Differentiating twice raises PyTorch's error. Without gradients the operators are called directly: for a single token
`apply` takes as long as they do.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llama_ft.kernels import at_least_fp32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x**2) + eps)`, [..., D] to [..., D], rounded to x's dtype before the gain, [D]."""
    if torch.is_grad_enabled():
        return RMSNormed.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]
    return _normed(x, weight, eps)[0]


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and the factor of each row of x."""
    x_fp32 = at_least_fp32(x)
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return (x_fp32 * scale).to(x.dtype) * weight, scale


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of two tensors of one shape."""
    if torch.is_grad_enabled():
        return SwiGLU.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]
    return F.silu(gate) * up


class RMSNormed(torch.autograd.Function):
    """`rms_norm` that keeps neither an fp32 copy of a 16-bit x nor the normalized x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keep x and one number per row."""
        normed, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """For y = x * scale with gradient g, the gradient of x is `scale * (g - y * mean(g * y))`."""
        x, weight, scale = ctx.saved_tensors
        to_x = to_weight = None
        normed = at_least_fp32(x) * scale
        if ctx.needs_input_grad[1]:
            to_weight = (gradient * normed.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            to_normed = at_least_fp32(gradient * weight)
            along = (to_normed * normed).mean(-1, keepdim=True)
            to_x = to_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)
        return to_x, to_weight, None


class SwiGLU(torch.autograd.Function):
    """`swiglu` that recomputes silu(gate) in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Keep both inputs."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class SummedCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(..., reduction="sum")`, without the two more [N, V] matrices that PyTorch's makes.

    `apply` takes logits, [N, V] in fp32 or fp64, and targets, int64 [N]; it returns a scalar.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Keep the log-probabilities."""
        log_probabilities = logits.log_softmax(-1)
        ctx.save_for_backward(log_probabilities, targets)
        return -log_probabilities.gather(-1, targets[:, None]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Probabilities less one at the target, computed in place of the log-probabilities."""
        log_probabilities, targets = ctx.saved_tensors
        probabilities = log_probabilities.exp_()
        probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
        return probabilities.mul_(gradient), None
