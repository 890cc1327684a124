"""Composing the config with Hydra, and checking it."""

import copy
import os
import re
import shlex
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_ft.cli.explain import TEXTS, not_allowed, type_of
from llama_ft.config import (
    FROM_CHECKPOINT,
    ConvertConfig,
    EvaluateConfig,
    GenerateConfig,
    PlanConfig,
    ReportConfig,
    TrainConfig,
    UserError,
    config_dir,
)

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

T = TypeVar("T")


def register() -> None:
    """Tell Hydra the schema, and OmegaConf how runs are named."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="report_schema", node=ReportConfig)
    ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    ConfigStore.instance().store(name="plan_schema", node=PlanConfig)
    ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)
    OmegaConf.register_new_resolver("combination", combination, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def combination(optim: DictConfig) -> str:
    """`${combination:${optim}}`: the names of the techniques that are on."""
    return "_".join(str(name) for name, on in optim.items() if on) or "baseline"


def run_name(*, _root_: DictConfig) -> str:
    """`${run_name:}`: the combination and whatever else the sweep varies; never a number, which would shift."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    swept = {
        override.key_or_group
        for override in parser.parse_overrides([a for a in sys.argv[1:] if "=" in a and not a.startswith("-")])
        if override.is_sweep_override()
    }
    swept |= set(OmegaConf.select(_root_, "hydra.sweeper.params") or {})
    varied = [
        override
        for override in parser.parse_overrides(list(_root_.hydra.overrides.task))
        if override.key_or_group in swept and override.key_or_group.split(".")[0] != "optim"
    ]
    parts = sorted(f"{override.key_or_group}={override.get_value_element_as_str()}" for override in varied)
    return ",".join([combination(_root_.optim), *(re.sub(r"[^\w.=+-]", "_", part) for part in parts)])


def composed_config(name: str, overrides: list[str], schema: type[T]) -> T:
    """The config of a command that is no Hydra application itself.

    Raises:
        UserError: naming the key that is wrong.
    """
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return checked_config(compose(config_name=name, overrides=overrides), overrides, schema)


def checked_config(composed: DictConfig, overrides: list[str], schema: type[T]) -> T:
    """The config as checked dataclasses.

    Raises:
        UserError: naming the key that is wrong.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(overrides):
        key, given, expected = override.key_or_group, override.value(), type_of(override.key_or_group)
        if (
            (expected is bool and not isinstance(given, bool))  # OmegaConf takes 1 for true
            or (is_dataclass(expected) and not isinstance(given, str))  # of a list of presets the last would win
            or (expected in TEXTS and given == "")  # $FILE where that is not set; the built-in one would be taken
        ):
            raise UserError(not_allowed(key, override.get_value_element_as_str()))
        if expected in TEXTS and isinstance(given, bool | int | float) and str(given) != (typed := _typed(override)):
            quoted = shlex.quote(f'{key}="{typed}"')
            raise UserError(
                f"{key}={typed} would be read as {given}: a text that looks like a number needs quotes, {quoted}"
            )
    checked = OmegaConf.to_object(_with_sizes(composed, overrides))
    assert isinstance(checked, schema)
    if added := _keys(OmegaConf.to_container(composed)) - _keys(asdict(checked)):  # type: ignore[call-overload]
        raise UserError(f"{min(added)} is not a key: `+` adds none here")
    return checked


def _with_sizes(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """The config with the sizes that the checkpoint says, where it is to say them; keys that are given keep theirs."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if OmegaConf.select(composed, "model.name") != FROM_CHECKPOINT:
        return composed
    if composed.checkpoint in (None, "builtin", "random"):
        raise UserError(f"model={FROM_CHECKPOINT} takes its sizes from a folder: give checkpoint=DIR")
    from llama_ft.model.folder import sizes_of

    folder = Path(os.path.expanduser(composed.checkpoint))
    given = {override.key_or_group for override in OverridesParser.create().parse_overrides(overrides)}
    sized = copy.deepcopy(composed)
    for key, value in sizes_of(folder).items():
        if f"model.{key}" not in given:
            try:
                sized.model[key] = value
            except (OmegaConfBaseException, ValueError) as error:
                raise UserError(f"checkpoint={folder}: its model.{key} is {value}, which cannot be") from error
    return sized


def _typed(override: "Override") -> str:
    """The value as it stands on the command line."""
    return str(override.input_line).partition("=")[2]


def _keys(settings: Any, prefix: str = "") -> set[str]:
    """Full names of all keys of a nested dictionary."""
    if not isinstance(settings, dict):
        return set()
    return {f"{prefix}{key}" for key in settings}.union(*(_keys(v, f"{prefix}{k}.") for k, v in settings.items()))
