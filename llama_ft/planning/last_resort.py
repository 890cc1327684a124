"""QLoRA, suggested by advice and refusals if no combination of techniques fits: its 4-bit weights cost quality."""

from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from llama_ft.bitsandbytes import is_installed
from llama_ft.config import Dtype, OptimConfig, TrainConfig, UserError
from llama_ft.config.checks import Offload, Settings

C = TypeVar("C", bound=TrainConfig)
NEEDS_PACKAGE = "4-bit weights may fit; planning them needs the package bitsandbytes: pip install 'llama_ft[quant]'"


def last_resorts(config: C) -> list[tuple[C, Settings]]:
    """Runs with 4-bit weights, largest first, and the settings that they change; none without bitsandbytes."""
    if not is_installed() or config.mp.frozen_weights is Dtype.nf4:
        return []
    found: list[tuple[C, Settings]] = []
    for gc, offload in ((False, None), (True, None), (True, Offload.cpu)):
        for ga in (False, True):
            optim = OptimConfig(ga=ga, mp=True, lora=True, gc=gc)
            mp, checkpointing = replace(config.mp, frozen_weights=Dtype.nf4), replace(config.gc, offload=offload)
            settings: Settings = {"mp.frozen_weights": "nf4"} | ({"gc.offload": "cpu"} if offload else {})
            with suppress(UserError):  # incompatible with the run's other settings
                found.append((replace(config, optim=optim, mp=mp, gc=checkpointing), settings))
    return found


def typed(optim: OptimConfig, settings: Settings) -> str:
    """A run as typed on the command line."""
    return " ".join([optim.as_typed, *(f"{key}={value}" for key, value in settings.items())])
