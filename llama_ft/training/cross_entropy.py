"""Cross-entropy that keeps one matrix of targets by vocabulary, and makes its gradient in it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SummedCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(..., reduction="sum")`, which makes two more such matrices in the backward pass.

    `apply` takes logits, [N, V] in fp32 or fp64, and targets, int64 [N]; it returns a scalar.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Keeps the log-probabilities."""
        log_probabilities = logits.log_softmax(-1)
        ctx.save_for_backward(log_probabilities, targets)
        return -log_probabilities.gather(-1, targets[:, None]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Probabilities less one at the target; a second backward pass is PyTorch's error."""
        log_probabilities, targets = ctx.saved_tensors
        probabilities = log_probabilities.exp_()
        probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
        return probabilities.mul_(gradient), None
