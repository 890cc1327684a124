"""The four techniques, each in a file of its own, and the one place that applies them."""

from dataclasses import dataclass

import torch

from llama_ft.config import TrainConfig
from llama_ft.model.transformer import Transformer
from llama_ft.techniques.gradient_checkpointing import checkpoint_layers
from llama_ft.techniques.lora import add_lora
from llama_ft.techniques.mixed_precision import Precision


@dataclass(frozen=True)
class Techniques:
    """What the loop needs to know. A technique that is off is a value that changes nothing."""

    accumulation_steps: int  # micro-batches in an optimizer step; 1 is off
    precision: Precision


def base_dtype(config: TrainConfig, precision: Precision) -> torch.dtype:
    """The dtype to load the model's weights in. Under LoRA they are all frozen."""
    return precision.weight_dtype(frozen=config.optim.lora)


def apply(model: Transformer, config: TrainConfig, precision: Precision) -> Techniques:
    """Change the loaded model in place, in the one order that works.

    LoRA comes first, since it decides what is frozen. Checkpointing comes after it, since it runs the final layers.

    Raises:
        UserError: if a LoRA target matches no linear layer.
    """
    if config.optim.lora:
        lora, dtype = config.lora, precision.weight_dtype(frozen=False)
        add_lora(model, lora.rank, lora.alpha, lora.dropout, lora.targets, dtype, lora.rslora)
    if config.optim.gc:
        checkpoint_layers(model, config.gc.every)
    return Techniques(config.ga.steps if config.optim.ga else 1, precision)
