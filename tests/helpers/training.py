"""Training steps of small models, in every combination of techniques."""

import torch
from torch import Tensor

from llama_ft.config import OptimConfig, TrainConfig
from llama_ft.config.techniques import combinations
from llama_ft.data.records import Sample
from llama_ft.techniques.lora import LoRALinear
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.setup import set_up
from llama_ft.training.step import TrainStep, Window

from .models import CPU

COMBINATIONS = list(combinations(["gc"]))  # all sixteen


def name(optim: OptimConfig) -> str:
    return optim.combination


def ragged_samples(lengths: tuple[int, ...] = (30, 12, 25, 8, 17, 40, 9, 21)) -> list[Sample]:
    """Samples whose numbers of target tokens differ by far more than their lengths."""
    generator = torch.Generator().manual_seed(0)
    prompts = (5, 2, 23, 3, 10, 4, 7, 19)
    return [
        Sample.after(torch.randint(0, 101, (length,), generator=generator).tolist(), prompt)
        for length, prompt in zip(lengths, prompts, strict=True)
    ]


def make_step(config: TrainConfig, optim: OptimConfig) -> TrainStep:
    """A run's step, with random weights."""
    config.optim, config.checkpoint = optim, "random"
    torch.manual_seed(config.training.seed)
    return set_up(config, Precision.of(config, "cpu", has_bf16=True), CPU)


def gradients(step: TrainStep, window: Window) -> list[Tensor]:
    """Before they are clipped; nothing is updated."""
    found: list[Tensor] = []
    step.update.max_grad_norm = float("inf")
    hook = step.optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.extend(p.grad.clone() for p in optimizer.param_groups[0]["params"])
    )
    step.dry_run(window)
    hook.remove()
    return found


def step_in(config: TrainConfig, optim: OptimConfig, dtype: torch.dtype) -> TrainStep:
    """A step whose weights have a dtype, without dropout, with an adapter that does something."""
    config.lora.dropout = 0.0
    step = make_step(config, optim)
    step.model.to(dtype)
    for layer in step.model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return step
