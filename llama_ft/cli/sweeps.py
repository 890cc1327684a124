"""The runs of a sweep, for a command that Hydra does not run."""

import re
import sys
from collections.abc import Sequence
from typing import TypeVar

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from llama_ft.cli.compose import checked_config, choices_of, register
from llama_ft.cli.effects import remarks
from llama_ft.cli.texts import as_typed, parsed
from llama_ft.config import config_dir

T = TypeVar("T")
OPTIONS = ("-m", "--multirun")


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return True if the arguments ask for a sweep: several values of a key are then several runs."""
    return any(argument in OPTIONS or re.match(r"\+?experiment=", argument) for argument in arguments)


def composed_runs(name: str, arguments: Sequence[str], schema: type[T]) -> list[T]:
    """The checked configs of the runs that `train` would make from these arguments, in the same order.

    Remarks go to standard error; a wrong key or value in one of the runs is a UserError.
    """
    register()
    texts = as_typed([argument for argument in arguments if argument not in OPTIONS], schema, sweeps=True)
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        fixed = [text for text, typed in zip(texts, parsed(texts), strict=True) if not typed.is_sweep_override()]
        params = OmegaConf.select(compose(name, fixed, return_hydra_config=True), "hydra.sweeper.params") or {}
        choices = choices_of([*(f"{key}={value}" for key, value in params.items()), *texts])
        composed = [compose(name, choice) for choice in choices]
    runs = [checked_config(config, choice, schema) for config, choice in zip(composed, choices, strict=True)]
    for line in remarks(runs[0], texts, lambda _: runs[1:]):
        print(line, file=sys.stderr)
    return runs
