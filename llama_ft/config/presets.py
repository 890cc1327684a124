"""The choices in `conf/` as dataclasses, for code that does not go through Hydra."""

from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from llama_ft.config.checks import check, literal
from llama_ft.config.model import PACKAGE_DIR

T = TypeVar("T")


def config_dir() -> Path:
    """The folder of the YAML files: next to the package in a checkout, inside it once installed."""
    inside = PACKAGE_DIR / "conf"
    return inside if inside.is_dir() else PACKAGE_DIR.parent / "conf"


def preset(group: str, name: str, schema: type[T], **changes: Any) -> T:
    """Load a choice of a config group, with some keys changed; for an unknown name a UserError lists the choices."""
    merged = OmegaConf.merge(OmegaConf.structured(schema), _load(group, name), literal(changes))
    return cast(T, OmegaConf.to_object(merged))


def _load(group: str, name: str) -> DictConfig:
    """Load a choice's keys, including those of the choices that it builds on."""
    folder = config_dir() / group
    file = folder / f"{name}.yaml"
    check(file.is_file(), group, name, f"one of {', '.join(sorted(choice.stem for choice in folder.glob('*.yaml')))}")
    own = cast(DictConfig, OmegaConf.load(file))
    bases = [_load(group, base) for base in own.pop("defaults", []) if base != "_self_"]
    return cast(DictConfig, OmegaConf.merge(*bases, own))
