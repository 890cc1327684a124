"""Puts a training run together: the model, its techniques, its weights, the optimizer, its schedule, the step.

Meta first: the model is built without memory, changed by the techniques, and only then allocated and filled, so that
each weight is allocated once, as whatever its module has become.
"""

import inspect
import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from llama_ft import techniques
from llama_ft.config import TrainConfig, TrainingConfig
from llama_ft.kernels import use_products_of, use_training_kernels
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import Log, build, materialise, open_weights, silent
from llama_ft.techniques.adapter import begin_with
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.step import TrainStep


def set_up(config: TrainConfig, precision: Precision, device: torch.device, log: Log = silent) -> TrainStep:
    """The training step of a run, with its model and optimizer.

    New parameters, such as LoRA's, are drawn from PyTorch's global random state.

    Raises:
        UserError: if the checkpoint has no weights for this model, or a technique or an adapter does not fit it.
    """
    weights = open_weights(str(config.checkpoint), config.model, config.training.seed)
    model = shape_model(config, precision)
    use_products_of(device, precision.compute)
    use_training_kernels(device)
    allocate(model, device)
    weights.load_into(model, precision.storage(frozen=config.optim.lora), log)
    if config.adapter is not None:
        begin_with(model, config.adapter)
        log(f"adapter: that of {config.adapter} is trained further")
    return make_step(model, config, precision)


def shape_model(config: TrainConfig, precision: Precision) -> Transformer:
    """The model with its techniques, on the meta device; a UserError if a technique does not fit it."""
    model = build(config.model)
    precision.storage(frozen=config.optim.lora).prepare(model)
    techniques.apply(model, config, precision)
    return model


def allocate(model: Transformer, device: torch.device) -> None:
    """Give the model memory on its device, and initial values to the parameters that no checkpoint holds."""
    materialise(model, device)
    techniques.initialize_added(model)


def make_step(model: Transformer, config: TrainConfig, precision: Precision) -> TrainStep:
    """The optimizer step of a model that is there."""
    optimizer = make_optimizer(model.parameters(), config.training)
    return TrainStep(model, optimizer, precision, config.training.max_grad_norm)


class AdamW(torch.optim.AdamW):
    """PyTorch's, without the wrappers that keep its compiler out, and import it for that: seconds of each start.

    Nor does a step ask whether a CUDA graph is captured, which none is: PyTorch 2.13 makes a context on a GPU for the
    question, though all parameters are on the CPU.
    """

    def _accelerator_graph_capture_health_check(self) -> None:
        return

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check  # before 2.13


for _name in ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad"):
    setattr(AdamW, _name, torch.no_grad()(inspect.unwrap(getattr(torch.optim.AdamW, _name))))


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the trainable parameters.

    Fused, on the CPU too: PyTorch's default form keeps one more copy of all parameters while it steps.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def lr_factor(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at an optimizer step counted from 0: linear up, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def make_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, config: TrainingConfig, steps_done: int = 0
) -> LambdaLR:
    """The schedule of a run of `total_steps` optimizer steps, of which some may have been done before."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # which LambdaLR looks for where it does not begin at the first step
    factor = partial(lr_factor, total_steps=total_steps, warmup_steps=math.ceil(config.warmup_ratio * total_steps))
    return LambdaLR(optimizer, factor, last_epoch=steps_done - 1)
