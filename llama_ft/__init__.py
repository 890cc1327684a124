"""Which of gradient accumulation, mixed precision, LoRA and gradient checkpointing to use for LLaMA on one GPU.

`import llama_ft as lf` gives the functions of `llama_ft.api`; PyTorch is imported when the first of them is used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llama_ft.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module("llama_ft.api"), name)
    except AttributeError as error:
        raise AttributeError(f"llama_ft has no {name}; llama_ft.api lists what there is") from error


def __dir__() -> list[str]:
    from importlib import import_module

    return ["__version__", *import_module("llama_ft.api").__all__]
