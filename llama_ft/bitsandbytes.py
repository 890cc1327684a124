"""The library bitsandbytes, which stores numbers in 4 and 8 bits; it comes with the extra `quant`."""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from llama_ft.config import UserError


def needs_package(setting: str) -> str:
    """What to say where the package is missing."""
    return f"{setting} needs the package bitsandbytes: pip install 'llama_ft[quant]'"


def is_installed() -> bool:
    """Whether the package is there; it is not loaded."""
    return find_spec("bitsandbytes") is not None


@cache
def bitsandbytes(setting: str) -> ModuleType:
    """The library, with its operators registered in `torch.ops.bitsandbytes`; a UserError if it is not to be had here.

    `setting` is what asks for it, as one types it.
    """
    # It warns of a kernel for generating on the CPU that it would download.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        raise UserError(needs_package(setting)) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{setting} needs the package bitsandbytes, which cannot be loaded: {error}") from error
