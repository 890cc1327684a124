"""Sets up a training run: the model, its techniques, its weights, the optimizer, its schedule, the step.

The model is built on the meta device, changed by the techniques, and only then allocated and filled, so that each
weight is allocated once, in its final form.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from llama_ft import techniques
from llama_ft.config import Schedule, TrainConfig, TrainingConfig
from llama_ft.kernels import use_products_of, use_training_kernels
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import build, materialize, open_weights
from llama_ft.parallel.ranks import ALONE, Ranks
from llama_ft.parallel.split import shard
from llama_ft.system import Log, silent
from llama_ft.techniques.adapter import begin_with
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.optimizers import make_optimizer
from llama_ft.training.step import TrainStep


def set_up(
    config: TrainConfig, precision: Precision, device: torch.device, log: Log = silent, ranks: Ranks = ALONE
) -> TrainStep:
    """The training step of a run, with model and optimizer; a UserError if weights, techniques or adapter do not fit.

    New parameters, such as LoRA's, are drawn from PyTorch's global random state.
    """
    make_optimizer([torch.nn.Parameter(torch.empty(0))], config.training)  # reports a missing package first
    weights = open_weights(str(config.checkpoint), config.model, config.training.seed)
    model = shape_model(config, precision, ranks)
    use_products_of(device, precision.compute)
    use_training_kernels(device)
    allocate(model, device)
    weights.load_into(model, precision.storage(frozen=config.optim.lora), log)
    if config.adapter is not None:
        begin_with(model, config.adapter)
        log(f"adapter: continuing to train {config.adapter}")
    if config.optim.gc and config.gc.offload is not None and device.type == "cpu":
        log("gc.offload=cpu: the blocks' inputs are already in the host's memory, so nothing is moved")
    return make_step(model, config.training, precision, ranks)


def shape_model(config: TrainConfig, precision: Precision, ranks: Ranks = ALONE) -> Transformer:
    """The model with its techniques, split over its processes, on the meta device; a UserError if they do not fit."""
    model = build(config.model)
    precision.storage(frozen=config.optim.lora).prepare(model)
    techniques.apply(model, config, precision)
    shard(model, ranks, precision)
    return model


def allocate(model: Transformer, device: torch.device) -> None:
    """Give the model memory on its device, and initial values to the parameters that no checkpoint holds."""
    materialize(model, device)
    techniques.initialize_added(model)


def make_step(model: Transformer, config: TrainingConfig, precision: Precision, ranks: Ranks = ALONE) -> TrainStep:
    """The training step of an allocated model."""
    optimizer = make_optimizer(model.parameters(), config)
    return TrainStep(model, optimizer, precision, config.max_grad_norm, config.optimizer_in_backward, ranks)


# Share of the peak learning rate, after `done` of the `steps` that follow the warm-up.
FALLS: dict[Schedule, Callable[[int, int], float]] = {
    Schedule.cosine: lambda done, steps: 0.5 * (1 + math.cos(math.pi * done / steps)),
    Schedule.linear: lambda done, steps: 1 - done / steps,
    Schedule.constant: lambda done, steps: 1.0,
}


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: Schedule = Schedule.cosine) -> float:
    """Share of the peak learning rate at an optimizer step counted from 0: a linear warm-up, then the schedule's decay.

    Cosine decays over half a period (Loshchilov and Hutter 2017, arXiv 1608.03983); cosine and linear end at 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return FALLS[schedule](step - warmup_steps, max(1, total_steps - warmup_steps))


def make_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, config: TrainingConfig, steps_done: int = 0
) -> LambdaLR:
    """The schedule of a run of `total_steps` optimizer steps, of which `steps_done` have been done."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # LambdaLR needs it to start after the first step
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    factor = partial(lr_factor, total_steps=total_steps, warmup_steps=warmup_steps, schedule=config.schedule)
    return LambdaLR(optimizer, factor, last_epoch=steps_done - 1)
