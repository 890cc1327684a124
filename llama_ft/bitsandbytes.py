"""The library bitsandbytes, which stores numbers in 4 and 8 bits; it comes with the extra `quant`."""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from llama_ft.config import UserError


def needs_package(setting: str) -> str:
    """Message for a missing package."""
    return f"{setting} needs the package bitsandbytes: pip install 'llama_ft[quant]'"


def is_installed() -> bool:
    """Return True if the package is installed; it is not loaded."""
    return find_spec("bitsandbytes") is not None


@cache
def bitsandbytes(setting: str) -> ModuleType:
    """Load the library, which registers its operators in `torch.ops.bitsandbytes`; a UserError if that fails.

    `setting` is the setting that needs it, as typed.
    """
    # It warns about a CPU kernel for generation that it would download.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        raise UserError(needs_package(setting)) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{setting} needs the package bitsandbytes, which cannot be loaded: {error}") from error
