"""Puts a training run together: the model, its techniques, its weights, the optimizer, the step.

Meta first: the model is built without memory, changed by the techniques, and only then allocated and filled, so that
each weight is allocated once, as whatever its module has become.
"""

import torch

from llama_ft import techniques
from llama_ft.config import TrainConfig
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import Log, build, materialise, open_weights, silent
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.optimizer import make_optimizer
from llama_ft.training.step import TrainStep


def set_up(config: TrainConfig, precision: Precision, device: torch.device, log: Log = silent) -> TrainStep:
    """The training step of a run, with its model and optimizer.

    New parameters, such as LoRA's, are drawn from PyTorch's global random state.

    Raises:
        UserError: if the checkpoint has no weights for this model, or a technique does not fit it.
    """
    weights = open_weights(str(config.checkpoint), config.model, config.training.seed)
    model = shape_model(config, precision)
    allocate(model, device)
    weights.load_into(model, precision.storage(frozen=config.optim.lora), log)
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
