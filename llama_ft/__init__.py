"""Measures what gradient accumulation, mixed precision, LoRA and gradient checkpointing save and cost for LLaMA.

`import llama_ft as lf` gives the functions of `llama_ft.api`; PyTorch is imported when the first of them is used.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from llama_ft.api import *  # noqa: F403


def _interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an interrupt without a traceback, even while the command is still being imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if any(part.startswith("llama_ft.") or os.path.basename(part) == "llama-ft" for part in sys.orig_argv):
    sys.excepthook = _interrupted


def __getattr__(name: str) -> Any:
    if name.startswith("_") or find_spec(f"llama_ft.{name}"):  # a submodule, which Python imports itself
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module("llama_ft.api"), name)
    except AttributeError as error:
        raise AttributeError(f"llama_ft has no {name}; llama_ft.api lists its names") from error


def __dir__() -> list[str]:
    return ["__version__", *import_module("llama_ft.api").__all__]
