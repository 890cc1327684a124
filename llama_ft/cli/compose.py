"""Composing the config with Hydra, checking it, and saying what in it may surprise."""

import copy
import hashlib
import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_ft import hub
from llama_ft.cli.explain import TEXTS, no_such_key, not_allowed, setting_of
from llama_ft.cli.texts import as_typed, parsed
from llama_ft.config import FROM_CHECKPOINT, SCHEMAS, TECHNIQUES, ModelConfig, TrainConfig, UserError, config_dir
from llama_ft.config.groups import ColumnsConfig
from llama_ft.config.plan import PlanConfig
from llama_ft.config.techniques import combination_name
from llama_ft.config.training import SEED
from llama_ft.files import HF_CONFIG, new_folder

T = TypeVar("T")
LONGEST_NAME = 140  # bytes of a folder's; where a file system is encrypted 143 is all it takes
DEFAULT_MODEL = "tiny"  # of conf/
LONGEST_END = 24  # characters of a value in a name that would be too long


@cache
def register() -> None:
    """Tell Hydra the schemas, and OmegaConf how runs are named; once is enough."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    OmegaConf.register_new_resolver("combination", combination_name)  # `${combination:${optim}}`
    OmegaConf.register_new_resolver("run_name", run_name)
    # Where runs start in the same second, each has a folder of its own.
    OmegaConf.register_new_resolver("new_folder", lambda name: str(new_folder(name)), use_cache=True)


def run_name(*, _root_: DictConfig) -> str:
    """`${run_name:}`: the combination and whatever else the sweep varies; never a number, which would shift."""
    swept = swept_keys(_root_)
    parts = sorted(
        f"{override.key_or_group}={override.get_value_element_as_str()}"
        for override in parsed(list(_root_.hydra.overrides.task))
        if override.key_or_group in swept and override.key_or_group.split(".")[0] != "optim"
    )
    plain = [combination_name(_root_.optim), *(re.sub(r"[^\w.=+-]", "_", part) for part in parts)]
    name = ",".join(plain)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    # Of long values, such as paths, the ends tell most; what tells them all apart is the hash.
    short = ",".join(f"{key}{equals}{value[-LONGEST_END:]}" for key, equals, value in (p.partition("=") for p in plain))
    cut = short.encode()[: LONGEST_NAME - 9].decode(errors="ignore")
    return f"{cut},{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def typed_overrides() -> list[Override]:
    """The overrides on the command line."""
    return parsed([argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")])


def swept_keys(config: DictConfig) -> set[str]:
    """The keys and groups of which a sweep has several values, on the command line or in its experiment."""
    swept = {override.key_or_group for override in typed_overrides() if override.is_sweep_override()}
    return swept | set(OmegaConf.select(config, "hydra.sweeper.params") or {})


def composed(name: str, overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    """A command's config as Hydra composes it, not checked; `with_hydra` adds the section `hydra`."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return compose(name, overrides, return_hydra_config=with_hydra)


def composed_config(name: str, overrides: list[str], schema: type[T]) -> T:
    """The checked config of a command that is not a Hydra application itself; a UserError names a wrong key.

    What is given and would surprise is said on standard error.
    """
    overrides = as_typed(overrides, schema)
    config = checked_config(composed(name, overrides), overrides, schema)
    for line in remarks(config, overrides):
        print(line, file=sys.stderr)
    return config


def checked_config(config: DictConfig, overrides: list[str], schema: type[T]) -> T:
    """The config as checked dataclasses; a UserError names a wrong key."""
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


def remarks(config: Any, overrides: list[str], swept: Collection[str] = ()) -> Iterator[str]:
    """A line for each technique and each key whose value, given in the overrides, changes nothing, and for backslashes.

    Args:
        config: the checked config that the overrides led to.
        swept: keys and groups of which a sweep has several values: a technique that is on in some of its runs is used.
    """
    keys = [override.key_or_group for override in parsed(overrides)]
    used = config.used_techniques if isinstance(config, TrainConfig) else set()
    for each in TECHNIQUES:
        idle = [key for key in keys if key.startswith(f"{each.name}.")]
        if idle and each.name not in used and not {"optim", f"optim.{each.name}"} & set(swept):
            yield f"{', '.join(idle)}: no effect without optim.{each.name}=true"
    if "sweep.order" in keys and SEED not in swept:
        yield f"sweep.order: no effect without repeats, such as {SEED}=0,1,2"
    for key in keys:
        entry, _ = setting_of(type(config), key)
        if entry is None:  # Hydra's own
            continue
        if (needs := entry.metadata.get("needs")) and not attrgetter(needs.partition("=")[0])(config):
            yield f"{key}: no effect without {needs}"
        value = attrgetter(key)(config)
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and re.search(r"\\[nt]", text) for text in texts):
            yield f"{key}: a backslash stays a backslash; for a line break type, in bash, $'{key}=...\\n...'"


def _check_value(schema: type, override: Override) -> None:
    """Refuse what Hydra and OmegaConf would take for something else than what was meant."""
    key, value = override.key_or_group, override.value()
    entry, expected = setting_of(schema, key)
    if entry is None and (override.is_add() or override.is_force_add()):  # Hydra adds any key
        raise UserError(no_such_key(schema, key))
    if (
        (expected is bool and not isinstance(value, bool))  # OmegaConf takes 1 for true
        # Of a list of presets the last would win.
        or (is_dataclass(expected) and not isinstance(value, dict if expected is ColumnsConfig else str))
        or (expected in TEXTS and value == "")  # $FILE where that is not set; the built-in one would be taken
    ):
        raise UserError(not_allowed(schema, key, override.get_value_element_as_str()))
    if "???" in (value if isinstance(value, list) else [value]):
        raise UserError(f"{key}=??? is not allowed: ??? marks what is missing; with a blank, in quotes, it is a text")


def _with_hub_folders(config: DictConfig, schema: type) -> dict[str, str]:
    """Put folders in the cache in the place of names on the hub, weights left out; the names by key."""
    keys = ("checkpoint", "base", "adapter", "tokenizer")
    named = {key: str(config[key]) for key in keys if key in config and hub.is_hub_name(config[key])}
    for key, name in named.items():
        path = hub.fetch(key, name)
        config[key] = str(path)
        if key == "checkpoint" and path.is_dir() and not (path / HF_CONFIG).is_file():  # in the weights are sizes too
            if not issubclass(schema, PlanConfig):
                hub.fetch_weights(key, name)
            elif config.model.name in (FROM_CHECKPOINT, DEFAULT_MODEL):
                problem = "is in Meta's format, which says the sizes in the weights, and a plan fetches none"
                raise UserError(f"checkpoint={name} {problem}: give model=NAME, such as llama2_7b")
    return named


def _with_sizes(sized: DictConfig, given: set[str]) -> DictConfig:
    """The config with the sizes that its checkpoint says, where it is to say them; the keys given keep theirs.

    It is to where no model is chosen, and the checkpoint is one of another model than the default.
    """
    if "model" not in sized:
        return sized
    sized.model.given = sorted(key.removeprefix("model.") for key in given if key.startswith("model."))
    is_asked, weights = sized.model.name == FROM_CHECKPOINT, OmegaConf.select(sized, "checkpoint")
    has_folder = weights not in (None, "builtin", "random")
    if is_asked and not has_folder:
        raise UserError(
            f"model={FROM_CHECKPOINT} takes its sizes from a checkpoint: give checkpoint=DIR, FILE.gguf or hub:ORG/NAME"
        )
    folder = Path(os.path.expanduser(weights or ""))
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
                raise UserError(f"checkpoint={folder}: its model.{key} is {value}, which cannot be") from error
    return sized


def _with_adapter(config: DictConfig, given: set[str], schema: type) -> DictConfig:
    """The config with rank, alpha and targets of the adapter that is trained further; keys given must agree."""
    if not issubclass(schema, TrainConfig) or config.adapter is None:
        return config
    from llama_ft.techniques.adapter import lora_settings

    model = cast(ModelConfig, OmegaConf.to_object(config.model))
    for key, value in lora_settings(config.adapter, model, config.checkpoint).items():
        said = OmegaConf.to_container(config.lora)[key]  # type: ignore[index, call-overload]
        if f"lora.{key}" in given and (sorted(said) != sorted(value) if isinstance(value, list) else said != value):
            raise UserError(f"lora.{key}={said} is not adapter={config.adapter}'s, {value}: leave it out")
        config.lora[key] = value
    return config
