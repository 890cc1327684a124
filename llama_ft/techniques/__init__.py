"""The techniques, one per file. The registry that lists them is `llama_ft.config.techniques`."""

from collections.abc import Callable
from pkgutil import resolve_name

from llama_ft.config import TECHNIQUES, TrainConfig
from llama_ft.model.transformer import Transformer
from llama_ft.techniques.mixed_precision import Precision


def apply(model: Transformer, config: TrainConfig, precision: Precision) -> None:
    """Change a model in place by each technique that is on, in the registry's order; a UserError if one does not fit.

    If the model is on the meta device, call `initialize_added` once it has been materialized.
    """
    for technique in TECHNIQUES:
        if technique.apply is not None and getattr(config.optim, technique.name):
            change: Callable[..., None] = resolve_name(technique.apply)
            change(model, getattr(config, technique.name), precision)


def initialize_added(model: Transformer) -> None:
    """Give initial values to the parameters that techniques added to the model, which no checkpoint holds."""
    for module in model.modules():
        if (initialize := getattr(module, "initialize_added", None)) is not None:
            initialize()
