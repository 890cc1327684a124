"""Composing the config with Hydra, and checking it."""

import copy
import hashlib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_ft import hub
from llama_ft.cli.effects import remarks
from llama_ft.cli.explain import TEXTS, no_such_key, not_allowed, setting_of
from llama_ft.cli.texts import as_typed, parsed
from llama_ft.config import FROM_CHECKPOINT, SCHEMAS, ModelConfig, PlanConfig, TrainConfig, UserError, config_dir
from llama_ft.config.groups import ColumnsConfig
from llama_ft.config.source import path_of
from llama_ft.config.techniques import combination_name
from llama_ft.files import HF_CONFIG, new_folder

T = TypeVar("T")
LONGEST_NAME = 140  # bytes of a folder's; an encrypted file system allows 143
DEFAULT_MODEL = "tiny"  # in conf/
QUOTES = "'\""  # around numbers that are texts
LONGEST_END = 24  # characters that are left of a value in a name that would be too long


@cache
def register() -> None:
    """Register the schemas with Hydra, and the resolvers of conf/ with OmegaConf, once."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    OmegaConf.register_new_resolver("combination", combination_name)  # `${combination:${optim}}`
    OmegaConf.register_new_resolver("run_name", run_name)
    # Runs that start in the same second have different folders.
    OmegaConf.register_new_resolver("new_folder", lambda name: str(new_folder(name)), use_cache=True)
    # Hydra passes their resolved values to the configs of a sweep's runs, in whichever process those are made.
    OmegaConf.register_new_resolver("command", command_line, use_cache=True)
    OmegaConf.register_new_resolver("typed", lambda: shlex.join(overrides_in(sys.argv[1:])), use_cache=True)


def run_name(*, _root_: DictConfig) -> str:
    """`${run_name:}`: the combination and whatever else the sweep varies; no run number, which would shift."""
    keys = {override.key_or_group for override in swept(_root_)}
    parts = sorted(
        f"{override.key_or_group}={override.get_value_element_as_str().strip(QUOTES)}"
        for override in parsed(list(_root_.hydra.overrides.task))
        if override.key_or_group in keys and override.key_or_group.split(".")[0] != "optim"
    )
    plain = [combination_name(_root_.optim), *(re.sub(r"[^\w.=+-]", "_", part) for part in parts)]
    name = ",".join(plain)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    # The ends of long values, such as paths, tell most; the hash makes the name unique.
    short = ",".join(f"{key}{equals}{value[-LONGEST_END:]}" for key, equals, value in (p.partition("=") for p in plain))
    cut = short.encode()[: LONGEST_NAME - 9].decode(errors="ignore")
    return f"{cut},{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def command_line() -> str:
    """The command as the user typed it."""
    typed = sys.orig_argv[1:]  # unlike sys.argv it has `-m llama_ft.train`, and no command changes it
    is_script = bool(typed) and not typed[0].startswith("-")
    return shlex.join([Path(typed[0]).name, *typed[1:]] if is_script else ["python", *typed])


def overrides_in(arguments: list[str]) -> list[str]:
    """The arguments that are not options."""
    return [argument for argument in arguments if "=" in argument and not argument.startswith("-")]


def typed_overrides() -> list[Override]:
    """The overrides on the command line."""
    return parsed(overrides_in(sys.argv[1:]))


def typed_in(config: DictConfig) -> list[Override]:
    """The overrides on the command line that made a run's or sweep's config, which has the section `hydra`."""
    return parsed(shlex.split(config.hydra.callbacks.sweep.typed))


def swept_keys() -> list[str]:
    """The keys and groups that Hydra's current sweep varies."""
    return [override.key_or_group for override in swept(cast(DictConfig, HydraConfig.instance().cfg))]


def swept(config: DictConfig) -> list[Override]:
    """The overrides with several values, on a sweep's command line or in its experiment."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    found = [*parsed([f"{key}={value}" for key, value in params.items()]), *typed_in(config)]
    return [override for override in found if override.is_sweep_override()]


def swept_configs(config: DictConfig, keys: set[str]) -> Iterator[DictConfig]:
    """Yield the unchecked configs of a sweep's runs as far as these keys may differ; `config` is one run's."""
    names = {*keys, *(key.partition(".")[0] for key in keys), "experiment", "recipe"}
    found = [override for override in swept(config) if override.key_or_group in names and override.is_discrete_sweep()]
    varied = {override.key_or_group: str(override.input_line) for override in found}
    others = [text for text in config.hydra.overrides.task if parsed([text])[0].key_or_group not in varied]
    for choice in choices_of(varied.values()) if varied else ():
        yield compose("train", [*others, *choice])  # by the running Hydra


def choices_of(overrides: Iterable[str]) -> list[list[str]]:
    """The overrides of each run of a sweep, split by Hydra's own sweeper, which knows `glob(*)` and `range(1,4)`."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    (choices,) = BasicSweeper.split_arguments(parser.parse_overrides(list(overrides)), max_batch_size=None)
    return choices


def composed(name: str, overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose a command's config by Hydra, unchecked; `with_hydra` adds the section `hydra`."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return compose(name, overrides, return_hydra_config=with_hydra)


def composed_config(name: str, overrides: list[str], schema: type[T]) -> T:
    """Compose and check the config of a command that Hydra does not run; print remarks on it."""
    overrides = as_typed(overrides, schema)
    config = checked_config(composed(name, overrides), overrides, schema)
    for line in remarks(config, overrides):
        print(line, file=sys.stderr)
    return config


def checked_config(config: DictConfig, overrides: list[str], schema: type[T]) -> T:
    """Convert the config to checked dataclasses; a UserError names a wrong key."""
    typed = parsed(overrides)
    for override in typed:
        _check_value(schema, override)
    given = {override.key_or_group for override in typed}
    config = copy.deepcopy(config)
    named = _with_hub_folders(config, schema)
    checked = OmegaConf.to_object(_with_adapter(_with_sizes(config, given), given, schema))
    assert isinstance(checked, schema)
    for key, name in named.items() if not issubclass(schema, PlanConfig) else ():
        hub.fetch_weights(key, name)
    return checked


def _check_value(schema: type, override: Override) -> None:
    """Raise a UserError for a value that Hydra or OmegaConf would misread."""
    key, value = override.key_or_group, override.value()
    entry, expected = setting_of(schema, key)
    if entry is None and (override.is_add() or override.is_force_add()):  # Hydra adds any key
        raise UserError(no_such_key(schema, key))
    if (
        (expected is bool and not isinstance(value, bool))  # OmegaConf takes 1 for true
        # With a list of presets the last would win.
        or (is_dataclass(expected) and not isinstance(value, dict if expected is ColumnsConfig else str))
        or (expected in TEXTS and value == "")  # $FILE if that is not set; the built-in one would be used
    ):
        raise UserError(not_allowed(schema, key, override.get_value_element_as_str()))
    if "???" in (value if isinstance(value, list) else [value]):
        raise UserError(f"{key}=??? is not allowed: ??? marks a missing value; with a blank, in quotes, it is a text")


def _with_hub_folders(config: DictConfig, schema: type) -> dict[str, str]:
    """Replace names on the hub by their folders in the cache, without weights; return the names by key."""
    keys = ("checkpoint", "base", "adapter", "tokenizer")
    named = {key: str(config[key]) for key in keys if key in config and hub.is_hub_name(config[key])}
    for key, name in named.items():
        path = hub.fetch(key, name)
        config[key] = str(path)
        if key == "checkpoint" and path.is_dir() and not (path / HF_CONFIG).is_file():  # Meta's weights tell sizes too
            if not issubclass(schema, PlanConfig):
                hub.fetch_weights(key, name)
            elif config.model.name in (FROM_CHECKPOINT, DEFAULT_MODEL):
                problem = "is in Meta's format, whose sizes need the weights, which a plan does not fetch"
                raise UserError(f"checkpoint={name} {problem}: give model=NAME, such as llama2_7b")
    return named


def _with_sizes(sized: DictConfig, given: set[str]) -> DictConfig:
    """Set the checkpoint's sizes if they are asked for, or no model is chosen; given keys keep their values."""
    if "model" not in sized:
        return sized
    sized.model.given = sorted(key.removeprefix("model.") for key in given if key.startswith("model."))
    is_asked, weights = sized.model.name == FROM_CHECKPOINT, OmegaConf.select(sized, "checkpoint")
    has_folder = weights not in (None, "builtin", "random")
    if is_asked and not has_folder:
        sources = "checkpoint=DIR, FILE.gguf or hub:ORG/NAME"
        raise UserError(f"model={FROM_CHECKPOINT} takes its sizes from a checkpoint: give {sources}")
    folder = path_of(weights or "")
    is_open = "model" not in given and sized.model.name == DEFAULT_MODEL and has_folder and folder.exists()
    if not (is_asked or is_open):
        return sized
    from llama_ft.model.folder import sizes_of

    said = {key: value for key, value in sizes_of(folder).items() if key not in sized.model.given}
    if is_asked or any(sized.model[key] != value for key, value in said.items() if key != "name"):
        for key, value in said.items():
            try:
                sized.model[key] = value
            except (OmegaConfBaseException, ValueError) as error:
                raise UserError(f"checkpoint={folder}: its model.{key} is {value}, which is not allowed") from error
    return sized


def _with_adapter(config: DictConfig, given: set[str], schema: type) -> DictConfig:
    """Set rank, alpha and targets of the adapter to train further; given keys must agree."""
    if not issubclass(schema, TrainConfig) or config.adapter is None:
        return config
    from llama_ft.techniques.adapter import lora_settings

    model = cast(ModelConfig, OmegaConf.to_object(config.model))
    for key, value in lora_settings(config.adapter, model, config.checkpoint).items():
        said = OmegaConf.to_container(config.lora)[key]  # type: ignore[index, call-overload]
        if f"lora.{key}" in given and (sorted(said) != sorted(value) if isinstance(value, list) else said != value):
            raise UserError(f"lora.{key}={said} differs from {value} of adapter={config.adapter}: leave it out")
        config.lora[key] = value
    return config
