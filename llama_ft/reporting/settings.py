"""The settings of runs by full name: those in which they differ, and their notation."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from llama_ft.config import TrainConfig, config_dir
from llama_ft.config.checks import Settings, flat, readable
from llama_ft.records.result import CONFIG_FILE

RECIPE = "recipe"  # a setting that sets others
# The combination is the table's column. The others do not change the run: how it is saved, tracked and supplied, and
# which of the model's sizes were typed.
NOT_COMPARED = tuple(
    "optim. tracker. data.cache_dir training.save_every training.resume sweep. hydra. model.given".split()
)


def differing(configs: Sequence[Settings]) -> list[str]:
    """The settings in which runs differ."""
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(NOT_COMPARED))
    return [key for key in keys if len({as_typed(config.get(key)) for config in configs}) > 1]


def varied(configs: Sequence[Settings]) -> list[str]:
    """The settings that differ, without those that follow from the name of the recipe, model, data set or card."""
    keys = differing(configs)
    for name, said in {RECIPE: "", "model.name": "model.", "data.name": "data.", "gpu.name": "gpu."}.items():
        if name in keys:
            alike: dict[Any, list[Settings]] = {}
            for config in configs:
                alike.setdefault(config.get(name), []).append(config)
            unsaid = {name, *(key for part in alike.values() for key in differing(part))}
            keys = [key for key in keys if not key.startswith(said) or key in unsaid]
    return keys


def as_typed(value: Any) -> str:
    """A value as typed: null, true, [wq, wv], inf; texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace("Infinity", "inf")


@cache
def defaults() -> Settings:
    """The values of keys that a run of an earlier version did not have."""
    schema: Any = OmegaConf.to_container(OmegaConf.structured(TrainConfig), enum_to_str=True)
    return {key: value for key, value in flat(schema).items() if value != "???"}


def run_settings(folder: Path) -> Settings | None:
    """A run's settings by full name; None if it was refused before it began. A UserError if they are damaged."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    with readable(file):
        settings: Settings = flat(yaml.safe_load(file.read_bytes()))
        return settings | {key: value for key, value in defaults().items() if key not in settings}


@cache
def ladder_order() -> list[str]:
    """The recipes in the order of `experiment=less_memory`."""
    ladder: Any = OmegaConf.load(config_dir() / "experiment" / "less_memory.yaml")
    return [name.strip() for name in ladder.hydra.sweeper.params.recipe.split(",")]
