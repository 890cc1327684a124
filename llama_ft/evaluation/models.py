"""The models of an evaluation, one after the other."""

import gc
from collections.abc import Callable

import torch

from llama_ft.config import EvaluateConfig
from llama_ft.decoding.load import Log, check_sources, load_base, load_trained
from llama_ft.evaluation.measures import EvalInputs, Measured, Progress, measure
from llama_ft.model.transformer import Transformer
from llama_ft.records.evaluation import Role


def measure_models(
    config: EvaluateConfig, inputs: EvalInputs, device: torch.device, dtype: torch.dtype, progress: Progress, log: Log
) -> list[Measured]:
    """The model, or base and fine-tuned, in this order; one of them is in memory at a time.

    Weights or adapter that are not this model's, or give no finite numbers, are a UserError.
    """

    def measured(role: Role, load: Callable[..., Transformer]) -> Measured:
        model, name = load(config, device, dtype, log), role.replace("_", "-")
        result = measure(model, inputs, config, role, lambda title, total: progress(f"{name}, {title}", total))
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    check_sources(config)
    if not config.has_base:
        return [measured("model", load_trained)]
    fine_tuned = measured("fine_tuned", load_trained)  # first, since most can be wrong with it
    return [measured("base", load_base), fine_tuned]
