"""A model to generate with or to evaluate: its weights, and the adapter trained on them."""

from collections.abc import Callable
from pathlib import Path

import torch

from llama_ft.config import TrainedSource
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model
from llama_ft.techniques.adapter import load_adapter


def load_trained(
    source: TrainedSource, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> Transformer:
    """The model that is asked for, in evaluation mode.

    Raises:
        UserError: if weights or adapter are not this model's.
    """
    model = load_model(source.model, str(source.checkpoint), device, dtype, say=say).eval()
    if source.adapter is not None:
        load_adapter(model, Path(source.adapter).expanduser(), source.merge)
    return model


def load_base(
    source: TrainedSource, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> Transformer:
    """What it is compared with: `source.base`, else the checkpoint without its adapter.

    Raises:
        UserError: if the weights are not this model's.
    """
    return load_model(source.model, source.base or str(source.checkpoint), device, dtype, say=say).eval()
