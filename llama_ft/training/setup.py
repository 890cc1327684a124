"""Puts a training run together: the model, its techniques, its weights, the optimizer, its schedule, the step.

Meta first: the model is built without memory, changed by the techniques, and only then allocated and filled, so that
each weight is allocated once, as whatever its module has become.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from llama_ft import techniques
from llama_ft.config import TrainConfig, TrainingConfig
from llama_ft.config.training import Optimizer, Schedule
from llama_ft.kernels import use_products_of, use_training_kernels
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import build, materialise, open_weights
from llama_ft.system import Log, silent
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
    if config.optim.gc and config.gc.offload is not None and device.type == "cpu":
        log("gc.offload=cpu: the blocks' inputs are in the host's memory as it is, and nothing is moved")
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
    """PyTorch's, of Loshchilov and Hutter 2019 (arXiv 1711.05101).

    A step does not ask whether a CUDA graph is captured, which none is: PyTorch 2.13 makes a context on a GPU for the
    question, though all parameters are on the CPU.
    """

    def _accelerator_graph_capture_health_check(self) -> None:
        return

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check  # before 2.13


class SGD(torch.optim.SGD):
    """PyTorch's: stochastic gradient descent (Robbins and Monro 1951, doi 10.1214/aoms/1177729586) with momentum.

    Momentum (Polyak 1964, doi 10.1016/0041-5553(64)90137-5) is PyTorch's form of Sutskever et al. 2013: b = momentum b
    + g, and a weight loses lr b. It begins at 0, from which the first step makes b = g, as in PyTorch; that would leave
    it unset where the fused kernel skips the first step, as under loss scaling.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        return super()._init_group(group, *lists)  # type: ignore[no-untyped-call]


# Without the wrappers that keep PyTorch's compiler out, and import it for that: seconds of each start.
for _class, _name in product((AdamW, SGD), ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")):
    setattr(_class, _name, torch.no_grad()(inspect.unwrap(getattr(_class, _name))))


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the config names, over the trainable parameters.

    Fused, on the CPU too: PyTorch's default form keeps one more copy of all parameters while it steps. SGD of 16-bit
    weights goes from one to the next instead: PyTorch's fused kernel for the CPU leaves most of such a weight as it is
    (pytorch/pytorch#191763, in 2.13 too).
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    decay = config.weight_decay
    if config.optimizer is Optimizer.adamw:
        return AdamW(trainable, config.lr, weight_decay=decay, fused=True)
    is_fused = all(parameter.dtype.itemsize > 2 for parameter in trainable)
    return SGD(trainable, config.lr, config.momentum, weight_decay=decay, fused=is_fused, foreach=False)


# Share of the peak learning rate, so many steps after the warm-up of so many that there are.
FALLS: dict[Schedule, Callable[[int, int], float]] = {
    Schedule.cosine: lambda done, steps: 0.5 * (1 + math.cos(math.pi * done / steps)),
    Schedule.linear: lambda done, steps: 1 - done / steps,
    Schedule.constant: lambda done, steps: 1.0,
}


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: Schedule = Schedule.cosine) -> float:
    """Share of the peak learning rate at an optimizer step counted from 0: linear up, then as the schedule falls.

    The cosine is half a period of it (Loshchilov and Hutter 2017, arXiv 1608.03983); it and the line end at 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return FALLS[schedule](step - warmup_steps, max(1, total_steps - warmup_steps))


def make_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, config: TrainingConfig, steps_done: int = 0
) -> LambdaLR:
    """The schedule of a run of `total_steps` optimizer steps, of which some may have been done before."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # which LambdaLR looks for where it does not begin at the first step
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    factor = partial(lr_factor, total_steps=total_steps, warmup_steps=warmup_steps, schedule=config.schedule)
    return LambdaLR(optimizer, factor, last_epoch=steps_done - 1)
