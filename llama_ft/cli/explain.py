"""What is wrong with what the user typed, and what is allowed instead, in a line."""

import enum
import errno
import os
import re
import shlex
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_type_hints

from llama_ft.config import TrainConfig, config_dir

TEXTS = (str, str | None)  # types of keys
_schema: type = TrainConfig  # of the command that runs


def use_schema(schema: type) -> None:
    """Explain the keys of this schema from now on."""
    global _schema
    _schema = schema


def type_of(key: str) -> Any:
    """The schema's type of a dotted key; None if there is no such key."""
    kind: Any = _schema
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return kind


def _allowed(key: str) -> str:
    """What a key may be, in words, from the choices in conf/ and the types of the schema."""
    if choices := sorted(file.stem for file in (config_dir() / key).glob("*.yaml")):
        return f"one of {', '.join(choices)}"
    expected = type_of(key)
    null = ", or null" if isinstance(expected, UnionType) else ""
    kind = get_args(expected)[0] if isinstance(expected, UnionType) else expected
    if is_dataclass(kind):
        return f"set by its keys, {', '.join(f'{key}.{field.name}' for field in fields(kind))}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(choice.name for choice in kind)}{null}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words.get(kind, "a list, such as [a,b]") + null


def not_allowed(key: str, value: str) -> str:
    """A value that a key cannot have, and what it can."""
    return f"{key}={value} is not allowed: it must be {_allowed(key)}"


def _unreadable(override: str) -> str:
    """What is wrong with an argument that Hydra cannot take apart, and how to write it."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: an argument must be KEY=VALUE"
    if (expected := type_of(key)) is not None and expected not in TEXTS:
        return not_allowed(key, value)
    text = os.path.expanduser(value).replace('"', r"\"")  # Hydra leaves `~` as it is
    quoted = shlex.quote(f'{key}="{text}"')
    return f"{override}: special characters need quotes, such as {quoted}"


def explain(error: BaseException) -> str:
    """An exception in a line: what is wrong, where, and what is allowed; Hydra's own words often lack a part."""
    text = str(error)
    if match := re.match(r"Error merging override [+~]*([\w.]+)=(.*)", text):
        return not_allowed(match[1], match[2])
    if match := re.match(r"Could not override '([\w.]+)'", text):
        section = match[1].rpartition(".")[0]
        known = type_of(section) if section else _schema
        keys = ", ".join(field.name for field in fields(known)) if is_dataclass(known) else "none"
        return f"{match[1]} is not a key: {section or 'the config'} has {keys}"
    if match := re.search(r"Could not find '([\w/]+)/([^'/]*)'", text):
        return not_allowed(match[1], match[2])
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        return f"{match[1]}: several values need -m (a sweep), [brackets] (a list) or quotes (a text)"
    if isinstance(override := getattr(error, "override", None), str):
        return _unreadable(override)
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):  # which names no file
        if not issubclass(_schema, TrainConfig):
            return f"{error.filename or 'the output'}: {error.strerror}"
        place = "hydra.run.dir=DIR, or for a sweep hydra.sweep.dir=DIR, names another folder for the output"
        return f"{error.filename or 'the folder for the output'}: {error.strerror}; {place}"
    lines: list[str] = []
    reason: BaseException | None = error
    while reason is not None:
        for line in map(str.strip, str(reason).splitlines()):
            if line and not any(line in said for said in lines):  # an error that quotes its cause has said it
                lines.append(line)
        reason = reason.__cause__
    unneeded = ("full_key:", "object_type=", "reference_type=")
    return ": ".join(line for line in lines if not line.startswith(unneeded)) or repr(error)
