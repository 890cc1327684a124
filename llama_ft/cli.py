"""What the commands share: composing the config, checking it, errors of a few lines instead of tracebacks."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from llama_ft import config
from llama_ft.config import PACKAGE_DIR, TrainConfig, UserError

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130


class Stop(BaseException):
    """Ends a whole sweep with a message. Hydra catches what derives from Exception and would go on to the next run."""


def config_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it once installed."""
    inside = PACKAGE_DIR / "conf"
    return inside if inside.is_dir() else PACKAGE_DIR.parent / "conf"


def command_line() -> str:
    """What the user typed, to be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else shlex.quote(sys.argv[0])
    return shlex.join([*program.split(), *sys.argv[1:]])


def register() -> None:
    """Tell Hydra the schema, and OmegaConf how runs are named."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
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


def checked_config(composed: DictConfig) -> TrainConfig:
    """The config as checked dataclasses.

    Raises:
        UserError: naming the key that is wrong.
    """
    for override in _overrides():
        schema_value = OmegaConf.select(OmegaConf.structured(TrainConfig), override.key_or_group, default=None)
        if isinstance(schema_value, bool) and not isinstance(override.value(), bool):
            given = override.get_value_element_as_str()
            raise UserError(f"{override.key_or_group}={given} is not allowed: it must be true or false")
    checked = cast(TrainConfig, OmegaConf.to_object(composed))
    if added := _keys(OmegaConf.to_container(composed)) - _keys(checked.to_dict()):
        raise UserError(f"{min(added)} is not a key: `+` adds none here")
    return checked


def _keys(settings: Any, prefix: str = "") -> set[str]:
    """Full names of all keys of a nested dictionary."""
    if not isinstance(settings, dict):
        return set()
    return {f"{prefix}{key}" for key in settings}.union(*(_keys(v, f"{prefix}{k}.") for k, v in settings.items()))


def _overrides() -> list[Any]:
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))


def explain(error: BaseException) -> str:
    """An exception in a line or two: what is wrong, where, and what is allowed.

    Hydra's first line often lacks the reason, so those of the exception's causes are joined to it.
    """
    lines: list[str] = []
    reason: BaseException | None = error
    while reason is not None:
        lines += [line.strip() for line in str(reason).splitlines() if line.strip() and line.strip() not in lines]
        reason = reason.__cause__
    text = "\n".join(lines)
    if choice := re.search(r"Could not find '([\w/]+)/([^'/]*)'\nAvailable options in .*\n((?:\w+\n)+)", text + "\n"):
        return f"{choice[1]}={choice[2]} is not a choice; there are {', '.join(choice[3].split())}"
    if key := re.search(r"Key '(\w+)' not in '(\w+)'", text):
        place = re.search(r"full_key: (\S+)|Could not override '([^']+)'|Error merging override \+*([^=]+)=", text)
        name = next(filter(None, place.groups())) if place else key[1]
        return f"{name} is not a key; there are {', '.join(config.__dict__[key[2]].__dataclass_fields__)}"
    unneeded = ("full_key:", "object_type=", "reference_type=", "To append to your config", "Config search path")
    return ": ".join(line.removeprefix("Error merging override ") for line in lines if not line.startswith(unneeded))


def run_command(function: Callable[[], int]) -> None:
    """Run a command to the exit status that it returns; errors become text unless HYDRA_FULL_ERROR=1 is set."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    signal.signal(signal.SIGTERM, _terminate)
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes errors on to us
    try:
        status = function()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        status = USAGE_ERROR
    except Exception as error:
        if wants_traceback:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        if not isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError | ValueError):
            print("this looks like a bug of ours; HYDRA_FULL_ERROR=1 shows where", file=sys.stderr)
        status = USAGE_ERROR
    sys.exit(status)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt
