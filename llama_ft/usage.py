"""`--help`: a command's groups with their choices, its keys with their defaults and meanings.

Read from the schema and from `conf/`, so that it cannot differ from what the command does, and without Hydra, so that
it is there at once. Hydra's own help is `--hydra-help`.
"""

import ast
import enum
import json
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from llama_ft.config import PACKAGE_DIR, config_dir

COMMANDS = ("train", "report", "plan", "generate", "evaluate", "convert")  # in the order of their use
OPTIONS = {
    "--help": "this text",
    "--version": "the version",
    "--cfg job": "print the resolved config, and do nothing",
    "--hydra-help": "Hydra's own options",
    "-sc install=bash": 'prints what completes keys and choices with Tab: eval "$(python -m MODULE -sc install=bash)"',
}


@dataclass(frozen=True)
class Usage:
    """What a command tells of itself."""

    name: str
    purpose: str
    arguments: str
    schema: type
    examples: tuple[str, ...]
    options: tuple[str, ...] = tuple(OPTIONS)


def print_commands(console: Console) -> None:
    """What `python -m llama_ft` prints: each command with the first line of its module."""
    console.print("Commands, each with --help:\n", highlight=False)
    table = Table.grid(padding=(0, 2))
    for name in COMMANDS:
        file = PACKAGE_DIR / f"{name}.py"
        if file.exists():
            purpose = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]
            table.add_row(f"  python -m llama_ft.{name}", purpose.partition(": ")[2])
    console.print(table, highlight=False, markup=False)


def print_help(usage: Usage, console: Console) -> None:
    """What `--help` prints."""

    def section(title: str, rows: Iterable[tuple[str, ...]]) -> None:
        console.print(f"\n{title}", style="bold", highlight=False, markup=False)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for row in rows:
            table.add_row(*(f"  {row[0]}", *row[1:]))
        console.print(table, highlight=False, markup=False)

    console.print(usage.purpose, highlight=False, markup=False)
    console.print(f"\n  python -m llama_ft.{usage.name} {usage.arguments}", highlight=False, markup=False)
    section("Examples", [(f"python -m llama_ft.{usage.name} {example}",) for example in usage.examples])
    defaults = chosen(usage)
    rows = [row for group, choice in defaults.items() for row in group_rows(group, choice)]
    section("GROUP=CHOICE, the default first", rows)
    section("KEY=VALUE: default, meaning", keys(usage.schema, preset_values(defaults)))
    section("Options", [(option, OPTIONS[option]) for option in usage.options])


def chosen(usage: Usage) -> dict[str, str | None]:
    """The groups and what each is unless told otherwise."""
    file = config_dir() / f"{usage.name}.yaml"
    entries = cast(DictConfig, OmegaConf.load(file)).defaults
    groups = [entry for entry in entries if not isinstance(entry, str)]
    return {group: choice for entry in groups for group, choice in entry.items() if not group.startswith("override ")}


def group_rows(group: str, default: str | None) -> Iterator[tuple[str, str, str]]:
    """A group, and its choices, each with the first comment of its file; those without one share a row."""
    comments = {file.stem: _comment(file) for file in (config_dir() / group).glob("*.yaml")}
    described = sorted(filter(comments.get, comments), key=lambda choice: (choice != default, choice))
    name = group
    if plain := sorted(choice for choice in comments if not comments[choice] and choice != default):
        yield name, default or "null", f"or {', '.join(plain)}"
        name = ""
    for choice in described:
        yield name, choice, comments[choice]
        name = ""


def _comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    return next((line for line in comments if not line.startswith(("@package", "python -m"))), "")


def preset_values(defaults: dict[str, str | None]) -> dict[str, Any]:
    """The keys that the default choices set, by full name."""
    values: dict[str, Any] = {}
    for group, choice in defaults.items():
        if choice:
            preset = cast(DictConfig, OmegaConf.load(config_dir() / group / f"{choice}.yaml"))
            values |= {f"{group}.{key!s}": value for key, value in preset.items()}
    return values


def keys(schema: type, presets: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """The schema's keys, each with its default and its meaning."""
    kinds = get_type_hints(schema)
    for entry in fields(schema):
        name, kind = f"{prefix}{entry.name}", kinds[entry.name]
        if is_dataclass(kind):
            yield from keys(kind, presets, f"{name}.")  # type: ignore[arg-type]
        elif "meaning" in entry.metadata:
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            meaning = entry.metadata["meaning"]
            if isinstance(kind, type) and issubclass(kind, enum.Enum):
                meaning += f" ({', '.join(choice.name for choice in kind)})"
            yield name, _text(presets.get(name, default)), meaning


def _text(value: Any) -> str:
    """A value as one types it."""
    text = json.dumps(value.name if isinstance(value, enum.Enum) else value)
    return text.replace('"', "").replace(", ", ",")
