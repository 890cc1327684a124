"""A model to generate with or to evaluate: its weights, and the adapter trained on them."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from llama_ft.config import TrainedSource, UserError
from llama_ft.model.checkpoint import open_checkpoint
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import build, load_model
from llama_ft.techniques.adapter import check_base_of, load_adapter
from llama_ft.techniques.peft import read_adapter


def check_sources(source: TrainedSource) -> None:
    """Look into the folders of weights and adapter before anything long begins.

    Raises:
        UserError: if what is in them is not this model's.
    """
    model = build(source.model)
    for key, weights in (("checkpoint", source.checkpoint), ("base", source.base)):
        if weights not in (None, "builtin", "random"):
            try:
                open_checkpoint(Path(os.path.expanduser(str(weights))), model)
            except UserError as error:
                raise UserError(str(error).replace("checkpoint=", f"{key}=", 1)) from error
    if source.adapter is not None:
        check_base_of(read_adapter(Path(os.path.expanduser(source.adapter)), source.model), str(source.checkpoint))


def load_checkpoint(
    source: TrainedSource, device: torch.device, dtype: torch.dtype, log: Callable[[str], None]
) -> Transformer:
    """The model that is asked for without its adapter, in evaluation mode.

    Raises:
        UserError: if the weights are not this model's.
    """
    return load_model(source.model, str(source.checkpoint), device, dtype, log=log).eval()


def load_trained(
    source: TrainedSource, device: torch.device, dtype: torch.dtype, log: Callable[[str], None]
) -> Transformer:
    """The model that is asked for, in evaluation mode.

    Raises:
        UserError: if weights or adapter are not this model's.
    """
    model = load_checkpoint(source, device, dtype, log)
    if source.adapter is not None:
        load_adapter(model, Path(os.path.expanduser(source.adapter)), source.merge)
    return model


def load_base(
    source: TrainedSource, device: torch.device, dtype: torch.dtype, log: Callable[[str], None]
) -> Transformer:
    """What it is compared with: `source.base`, else the checkpoint without its adapter.

    Raises:
        UserError: if the weights are not this model's.
    """
    return load_model(source.model, source.base or str(source.checkpoint), device, dtype, log=log).eval()
