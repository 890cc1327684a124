"""`--help`: a command's groups with their choices, its keys with their defaults and meanings.

Read from the schema and from `conf/`, so that it cannot differ from what the command does, and without Hydra, so that
it is there at once. Hydra's own help is `--hydra-help`.
"""

import ast
import enum
import json
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from rich.console import Console
from rich.text import Text

import llama_ft
from llama_ft.config import PACKAGE_DIR, config_dir

COMMANDS = ("train", "report", "plan", "generate", "evaluate", "convert")  # in the order of their use
OPTIONS = {
    "-m, --multirun": "a sweep: a run for each combination of the values that commas separate",
    "hydra.run.dir=DIR": "the folder of a run; else a new one in outputs/runs",
    "hydra.sweep.dir=DIR": "the folder of a sweep, which goes on where an earlier one in it stopped; else a new one in"
    " outputs/sweeps",
    "--help": "this text",
    "--version": "the version",
    "--cfg job": "print the resolved config, and do nothing",
    "--hydra-help": "Hydra's own options",
    "-sc install=bash": "prints what lets Tab complete keys and choices in bash:\n"
    'eval "$(python -m {module} -sc install=bash)"',
}
MIN_WIDTH = 30  # characters of a last column, however narrow the terminal is

Row = tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """What a command tells of itself."""

    name: str
    purpose: str
    arguments: str
    schema: type
    examples: tuple[str, ...]
    options: tuple[str, ...] = tuple(OPTIONS)

    @property
    def module(self) -> str:
        """What follows `python -m`."""
        return f"llama_ft.{self.name}"


def commands() -> dict[str, str]:
    """The commands that there are, by name, each with the first line of its module's docstring."""
    files = {name: PACKAGE_DIR / f"{name}.py" for name in COMMANDS}
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
    return {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in trees.items()}


def print_commands(console: Console) -> None:
    """What `python -m llama_ft` prints."""
    rows = [
        (f"python -m llama_ft.{name}", line.partition(": ")[2].replace("`", "")) for name, line in commands().items()
    ]
    lines = [*_wrapped(str(llama_ft.__doc__), console.width), "", "Commands, each with --help:"]
    _print(console, Text("\n".join([*lines, *table(rows, console.width)])))


def print_help(usage: Usage, console: Console) -> None:
    """What `--help` prints."""
    defaults = chosen(usage)
    choices = [row for group, choice in defaults.items() for row in group_rows(group, choice)]
    options = [(option, OPTIONS[option].format(module=usage.module)) for option in usage.options]
    text = Text("\n".join(_wrapped(usage.purpose, console.width)))
    text.append(f"\n\n  python -m {usage.module} {usage.arguments}\n")
    for title, lines in (
        ("Examples", [f"  python -m {usage.module} {example}" for example in usage.examples]),
        ("GROUP=CHOICE, the default first", table(choices, console.width)),
        ("KEY=VALUE: default, meaning", table(keys(usage.schema, presets(usage, defaults)), console.width)),
        ("Options", table(options, console.width)),
    ):
        text.append(f"\n{title}\n", style="bold")
        text.append("".join(f"{line}\n" for line in lines))
    text.rstrip()
    _print(console, text)


def _print(console: Console, text: Text) -> None:
    """Print lines as they are; what is to be copied is neither cut nor broken."""
    console.print(text, soft_wrap=True)


def _wrapped(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    """The text in lines of the width, in characters, with what each begins with."""
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
    return lines or [first.rstrip()]


def table(rows: Iterable[Row], width: int) -> Iterator[str]:
    """The lines of a table; the last column, which is text, is wrapped to the width in characters."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    margin = sum(column + 2 for column in widths) + 2
    for *cells, text in rows:
        start = "  " + "".join(f"{cell:<{column}}  " for cell, column in zip(cells, widths, strict=True))
        for line in text.splitlines() or [""]:
            yield from _wrapped(line, max(width, margin + MIN_WIDTH), start, " " * margin)
            start = " " * margin


def chosen(usage: Usage) -> dict[str, str | None]:
    """The groups and what each is unless told otherwise."""
    groups = [entry for entry in _primary(usage)["defaults"] if not isinstance(entry, str)]
    return {group: choice for entry in groups for group, choice in entry.items() if not group.startswith("override ")}


def group_rows(group: str, default: str | None) -> Iterator[Row]:
    """A group and its choices, the default first, each with the first comment of its file."""
    comments = {file.stem: _comment(file) for file in sorted((config_dir() / group).glob("*.yaml"))}
    own = "none of them" if default is None else comments.pop(default)
    plain = ", ".join(choice for choice, comment in comments.items() if not comment)
    yield group, default or "null", "; ".join(filter(None, (own, plain and f"or {plain}")))
    for choice, comment in comments.items():
        if comment:
            yield "", choice, comment


def _comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    return next((line for line in comments if not line.startswith(("@package", "python -m"))), "")


def presets(usage: Usage, defaults: dict[str, str | None]) -> dict[str, Any]:
    """The keys that the default choices and the command's own file set, by full name."""
    values: dict[str, Any] = {}
    for group, choice in defaults.items():
        if choice:
            values |= _preset(group, choice)
    own = {key: value for key, value in _primary(usage).items() if key not in ("defaults", "hydra")}
    return values | dict(_leaves(own, ""))


def _primary(usage: Usage) -> dict[str, Any]:
    return _load(config_dir() / f"{usage.name}.yaml")


def _preset(group: str, choice: str) -> dict[str, Any]:
    """The keys of a choice by full name, those of the choices that it builds on included."""
    own = _load(config_dir() / group / f"{choice}.yaml")
    values: dict[str, Any] = {}
    for other in own.pop("defaults", []):
        if other != "_self_":
            values |= _preset(group, other)
    return values | dict(_leaves(own, f"{group}."))


def _load(file: Path) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)))


def _leaves(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def keys(schema: type, values: dict[str, Any], prefix: str = "") -> Iterator[Row]:
    """The schema's keys, each with its default, from `values` where it is there, and its meaning."""
    kinds = get_type_hints(schema)
    for entry in fields(schema):
        name, kind = f"{prefix}{entry.name}", kinds[entry.name]
        if is_dataclass(kind):
            yield from keys(cast(type, kind), values, f"{name}.")
        else:
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            meaning = entry.metadata["meaning"]
            for part in (kind, *get_args(kind)):
                if isinstance(part, type) and issubclass(part, enum.Enum):
                    meaning += f"; one of {', '.join(choice.name for choice in part)}"
            yield name, _typed(values.get(name, default)), meaning


def _typed(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, str):
        return "required" if value == "???" else value
    return json.dumps(value)
