"""What the commands share: composing the config, checking it, errors of a few lines instead of tracebacks."""

import enum
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from llama_ft import __version__
from llama_ft.config import ReportConfig, TrainConfig, UserError, config_dir
from llama_ft.usage import Usage, print_help

T = TypeVar("T")
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130
TEXTS = (str, str | None)  # types of keys
_schema: type = TrainConfig  # of the command that runs


class Stop(BaseException):
    """Ends a whole sweep with a message. Hydra catches what derives from Exception and would go on to the next run."""


def command_line() -> str:
    """What the user typed, to be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else shlex.quote(sys.argv[0])
    return shlex.join([*program.split(), *sys.argv[1:]])


def register() -> None:
    """Tell Hydra the schema, and OmegaConf how runs are named."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="report_schema", node=ReportConfig)
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
        key, given, expected = override.key_or_group, override.value(), _type_of(override.key_or_group)
        if (
            (expected is bool and not isinstance(given, bool))  # OmegaConf takes 1 for true
            or (is_dataclass(expected) and not isinstance(given, str))  # of a list of presets the last would win
            or (expected in TEXTS and given == "")  # $FILE where that is not set; the built-in one would be taken
        ):
            raise UserError(_not_allowed(key, override.get_value_element_as_str()))
    checked = OmegaConf.to_object(composed)
    assert isinstance(checked, schema)
    if added := _keys(OmegaConf.to_container(composed)) - _keys(asdict(checked)):  # type: ignore[call-overload]
        raise UserError(f"{min(added)} is not a key: `+` adds none here")
    return checked


def _keys(settings: Any, prefix: str = "") -> set[str]:
    """Full names of all keys of a nested dictionary."""
    if not isinstance(settings, dict):
        return set()
    return {f"{prefix}{key}" for key in settings}.union(*(_keys(v, f"{prefix}{k}.") for k, v in settings.items()))


def _type_of(key: str) -> Any:
    """The schema's type of a dotted key; None if there is no such key."""
    kind: Any = _schema
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return kind


def _allowed(key: str) -> str:
    """What a key may be, in words, from the choices in conf/ and the types of the schema."""
    if choices := sorted(file.stem for file in (config_dir() / key).glob("*.yaml")):
        return f"one of {', '.join(choices)}"
    expected = _type_of(key)
    null = ", or null" if isinstance(expected, UnionType) else ""
    kind = get_args(expected)[0] if isinstance(expected, UnionType) else expected
    if is_dataclass(kind):
        return f"set by its keys, {', '.join(f'{key}.{field.name}' for field in fields(kind))}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(choice.name for choice in kind)}{null}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words.get(kind, "a list, such as [a,b]") + null


def _not_allowed(key: str, value: str) -> str:
    return f"{key}={value} is not allowed: it must be {_allowed(key)}"


def _unreadable(override: str) -> str:
    """What is wrong with an argument that Hydra cannot take apart, and how to write it."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: an argument must be KEY=VALUE"
    if (expected := _type_of(key)) is not None and expected not in TEXTS:
        return _not_allowed(key, value)
    text = os.path.expanduser(value).replace('"', r"\"")  # Hydra leaves `~` as it is
    quoted = shlex.quote(f'{key}="{text}"')
    return f"{override}: special characters need quotes, such as {quoted}"


def explain(error: BaseException) -> str:
    """An exception in a line: what is wrong, where, and what is allowed; Hydra's own words often lack a part."""
    text = str(error)
    if match := re.match(r"Error merging override [+~]*([\w.]+)=(.*)", text):
        return _not_allowed(match[1], match[2])
    if match := re.match(r"Could not override '([\w.]+)'", text):
        section = match[1].rpartition(".")[0]
        known = _type_of(section) if section else _schema
        keys = ", ".join(field.name for field in fields(known)) if is_dataclass(known) else "none"
        return f"{match[1]} is not a key: {section or 'the config'} has {keys}"
    if match := re.search(r"Could not find '([\w/]+)/([^'/]*)'", text):
        return _not_allowed(match[1], match[2])
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        return f"{match[1]}: several values need -m (a sweep), [brackets] (a list) or quotes (a text)"
    if isinstance(override := getattr(error, "override", None), str):
        return _unreadable(override)
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):  # which names no file
        place = "hydra.run.dir=DIR, or for a sweep hydra.sweep.dir=DIR, names another folder for the output"
        return f"{error.filename or 'the folder for the output'}: {error.strerror}; {place}"
    lines: list[str] = []
    reason: BaseException | None = error
    while reason is not None:
        lines += [line.strip() for line in str(reason).splitlines() if line.strip() and line.strip() not in lines]
        reason = reason.__cause__
    unneeded = ("full_key:", "object_type=", "reference_type=")
    return ": ".join(line for line in lines if not line.startswith(unneeded)) or repr(error)


def run_command(function: Callable[[], int], usage: Usage) -> None:
    """Run a command to the exit status that it returns; errors become text unless HYDRA_FULL_ERROR=1 is set."""
    global _schema
    _schema = usage.schema
    if {"--help", "-h"} & set(sys.argv[1:]):
        print_help(usage, Console())
        sys.exit(0)
    if "--version" in sys.argv[1:]:
        print(f"llama_ft {__version__}")
        sys.exit(0)
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
    except BrokenPipeError:  # whoever read our output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILED
    except Stop as stop:
        if wants_traceback:
            raise
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
