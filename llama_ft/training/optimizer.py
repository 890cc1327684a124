"""AdamW and the learning rate's course."""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from llama_ft.config import TrainingConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the trainable parameters.

    Fused, on the CPU too: PyTorch's default form keeps one more copy of all parameters while it steps.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def lr_factor(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at an optimizer step counted from 0: linear up, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def make_schedule(optimizer: torch.optim.Optimizer, total_steps: int, warmup_ratio: float) -> LambdaLR:
    """The schedule of a run of `total_steps` optimizer steps."""
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    return LambdaLR(optimizer, partial(lr_factor, total_steps=total_steps, warmup_steps=warmup_steps))
