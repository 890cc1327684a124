"""One-line explanations of what is wrong in the user's input, and what is allowed instead."""

import enum
import errno
import re
import shlex
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, get_args, get_type_hints

from llama_ft.config import TrainConfig, UserError, config_dir

TEXTS = (str, str | None)  # types of keys
FILES = {  # hints for paths given as choices
    "data": "for a file give data.path=",
    "model": "for the Hugging Face hub give checkpoint=hub:ORG/NAME, for a folder checkpoint=",
}
PLUGINS = {  # choices from Hydra's plugins: the package of each, and our extra that installs it
    "hydra/sweeper=optuna": ("hydra-optuna-sweeper", "tune"),
    "hydra/launcher=joblib": ("hydra-joblib-launcher", "joblib"),
    "hydra/launcher=submitit_local": ("hydra-submitit-launcher", "slurm"),
    "hydra/launcher=submitit_slurm": ("hydra-submitit-launcher", "slurm"),
}
RENAMED = {  # keys, and values of keys, that no longer exist: what to do instead
    "training.batch_size": "use training.micro_batch_size",
    "model.context": "use model.max_seq_len",
    "gpu.memory_mb": "use gpu.memory_mib",
    "gpu.context_mb": "use gpu.context_mib",
    "measure.memory_limit_mb": "use measure.memory_limit_mib",
    "tracker.mode=disabled": "use tracker=disabled",
    "combinations=eight": "use combinations=all",
    "combinations=sixteen": "use gc=both",
    "probe": "leave it out",
}


def setting_of(schema: type, key: str) -> tuple[Field[Any] | None, Any]:
    """The field of a dotted key, and its type; (None, None) if there is no such key."""
    entry, kind = None, schema
    for part in key.split("."):
        entry = {field.name: field for field in fields(kind)}.get(part) if is_dataclass(kind) else None
        kind = get_type_hints(kind)[part] if entry else type(None)
    return entry, kind if entry else None


def choices(entry: Field[Any], kind: Any) -> list[str]:
    """The allowed values of a key of an enum type; empty for other types."""
    enums = [part for part in (kind, *get_args(kind)) if isinstance(part, type) and issubclass(part, enum.Enum)]
    return entry.metadata["allowed"] or [choice.name for part in enums for choice in part]


def not_allowed(schema: type, key: str, value: str) -> str:
    """Say that a key cannot have a value, and which it can, by the choices in conf/ and the types of the schema."""
    if instead := RENAMED.get(f"{key}={value}"):
        return f"{key}={value} no longer exists: {instead}"
    entry, expected = setting_of(schema, key)
    if entry is None:
        return no_such_key(schema, key)
    null = ", or null" if isinstance(expected, UnionType) else ""
    kind = get_args(expected)[0] if isinstance(expected, UnionType) else expected
    if names := sorted(file.stem for file in (config_dir() / key).glob("*.yaml")):
        allowed = f"one of {', '.join(names)}"
        if key in FILES and re.search(r"[./~]", value):
            allowed += f"; {FILES[key]}{value}"
    elif is_dataclass(kind):
        allowed = f"set by its keys, {', '.join(f'{key}.{field.name}' for field in fields(kind))}"
    elif names := choices(entry, kind):
        allowed = f"one of {', '.join(names)}{null}"
    else:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        allowed = words.get(kind, "a list, such as [a,b]") + null
    return f"{key}={value} is not allowed: it must be {allowed}"


def no_such_key(schema: type, key: str) -> str:
    """Say that a key does not exist, and which do in its last section that does."""
    if instead := RENAMED.get(key):
        return f"{key} no longer exists: {instead}"
    if re.match("hydra[./]", key):
        return f"{key} is not a key: --cfg hydra prints those of Hydra"
    parts = key.split(".")
    n_known = sum(1 for n in range(1, len(parts)) if setting_of(schema, ".".join(parts[:n]))[0])
    section = ".".join(parts[:n_known])
    known = setting_of(schema, section)[1] if section else schema
    names = [field.name for field in fields(known)] if is_dataclass(known) else []
    elsewhere = [name for name in _keys(schema) if name.rpartition(".")[2] == parts[-1]]
    close = [".".join([*parts[:n_known], name]) for name in get_close_matches(parts[n_known], names, 1)]
    matches = elsewhere if len(elsewhere) == 1 else close
    meant = "".join(f"; did you mean {match}?" for match in matches)
    return f"{key} is not a key{meant or ':'} {section or 'the config'} has {', '.join(names) or 'none'}"


def _keys(schema: type) -> Iterator[str]:
    """Yield the keys of a schema, those in its sections with the section's name."""
    for entry in fields(schema):
        kind = get_type_hints(schema)[entry.name]
        yield from (f"{entry.name}.{key.name}" for key in fields(kind)) if is_dataclass(kind) else (entry.name,)


def _no_such_choice(schema: type, group: str, value: str, names: list[str]) -> str:
    if setting_of(schema, group)[0]:
        return not_allowed(schema, group, value)
    if plugin := PLUGINS.get(f"{group}={value}"):
        package, extra = plugin
        return f"{group}={value} needs the package {package}: pip install 'llama_ft[{extra}]'"
    more = ", or a choice from an installed plugin of Hydra" if group.startswith("hydra/") else ""
    return f"{group}={value} is not allowed: it must be {'one of ' * (len(names) > 1)}{', '.join(names)}{more}"


def _unreadable(schema: type, override: str) -> str:
    """Say what is wrong with an argument that Hydra cannot parse, and how to write it."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: an argument must be KEY=VALUE"
    if not key.startswith("hydra."):
        return not_allowed(schema, key.lstrip("+"), value)
    text = value.replace('"', r"\"")
    quoted = shlex.quote(f'{key}="{text}"')
    return f"{override}: special characters need quotes, such as {quoted}"


def explain(error: BaseException, schema: type = TrainConfig) -> str:
    """Explain an exception in a line: what is wrong, where, and what is allowed; Hydra's text often lacks a part."""
    text = str(error)
    if match := re.match(r"Error merging override [+~]*([\w.]+)=(.*)", text):
        return not_allowed(schema, match[1], match[2])
    if match := re.match(r"Could not override '([^']+)'.*?=(.*)", text, re.DOTALL):
        key_is_there = setting_of(schema, match[1])[0] is not None
        return not_allowed(schema, match[1], match[2]) if key_is_there else no_such_key(schema, match[1])
    if match := re.search(r"Could not find '(.*)'\s+Available options in '(.*)':((?:\n\t\w+)*)", text):
        return _no_such_choice(schema, match[2], match[1].removeprefix(f"{match[2]}/"), match[3].split())
    if text.endswith("does not support sweep type : INTERVAL_SWEEP"):
        return "interval(...) needs hydra/sweeper=optuna, which samples from it: a plain sweep needs a list of values"
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        return f"{match[1]}: several values need -m (a sweep), [brackets] (a list) or quotes (a text)"
    if isinstance(override := getattr(error, "override", None), str):
        return _unreadable(schema, override)
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):  # which names no file
        if schema is not TrainConfig:
            return f"{error.filename or 'the output'}: {error.strerror}"
        folder = "hydra.run.dir=DIR, or for a sweep hydra.sweep.dir=DIR, names another folder for the output"
        return f"{error.filename or 'the folder for the output'}: {error.strerror}; {folder}"
    return _reasons(error)


def _reasons(error: BaseException) -> str:
    """The messages of the error and of its causes, each once."""
    lines: list[str] = []
    reason: BaseException | None = error
    while reason is not None:
        for line in map(str.strip, str(reason).splitlines()):
            if line and not any(line in earlier for earlier in lines):
                lines.append(line)
        reason = None if isinstance(reason, UserError) else reason.__cause__  # its message is complete
    omegaconf = ("full_key:", "object_type=", "reference_type=")
    return ": ".join(line for line in lines if not line.startswith(omegaconf)) or repr(error)
