"""`--help`: a command's groups with their choices, its keys with their defaults and meanings.

Generated from the schema and `conf/`, so that it cannot differ from the command. Hydra's own help is `--hydra-help`.
"""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from llama_ft.cli.compose import composed
from llama_ft.cli.explain import choices
from llama_ft.cli.texts import RULE
from llama_ft.config import config_dir

OPTIONS = {
    "-m, --multirun": "a sweep: a run for each combination of comma-separated values",
    "hydra.run.dir=DIR": "the run's folder; by default a new one in outputs/runs",
    "hydra.sweep.dir=DIR": "the sweep's folder, in which an earlier sweep is resumed; by default a new one in"
    " outputs/sweeps",
    "--help": "print this text",
    "--version": "print the version",
    "--cfg job": "print the resolved config, and run nothing",
    "--hydra-help": "print Hydra's own options",
}
MIN_WIDTH = 27  # characters of the last column, however narrow the terminal is

Row = tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """A command's description for `--help`."""

    name: str
    purpose: str
    arguments: str
    schema: type
    examples: tuple[str, ...]
    options: tuple[str, ...] = ("--help", "--version")  # of OPTIONS

    @property
    def module(self) -> str:
        """The module, for `python -m`."""
        return f"llama_ft.{self.name}"


def print_help(usage: Usage, console: Console) -> None:
    """Print a command's help."""
    config, command = composed(usage.name, [], with_hydra=True), f"  python -m {usage.module}"
    groups = {name: choice for name, choice in config.hydra.runtime.choices.items() if not name.startswith("hydra/")}
    rows = [row for group in reversed(groups) for row in group_rows(group, groups[group])]
    purpose, rule = (textwrap.fill(text, console.width, break_on_hyphens=False) for text in (usage.purpose, RULE))
    text = Text(f"{purpose}\n\n{command} {usage.arguments}\n\n{rule}\n")
    for title, lines in (
        ("Examples", [f"{command} {example}" for example in usage.examples]),
        ("GROUP=CHOICE, the default first", table(rows, console.width)),
        ("KEY=VALUE: default, meaning", table(keys(usage.schema, config), console.width)),
        ("Options", table([(option, OPTIONS[option]) for option in usage.options], console.width)),
    ):
        text.append(f"\n{title}\n", style="bold")
        text.append("".join(f"{line}\n" for line in lines))
    text.rstrip()
    console.print(text, soft_wrap=True)  # lines to be copied are neither cut nor wrapped


def table(rows: Iterable[Row], width: int) -> Iterator[str]:
    """Yield the lines of a table; the last column, which is text, is wrapped to the width in characters."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    margin = sum(column + 2 for column in widths) + 2
    wrapper = textwrap.TextWrapper(max(width, margin + MIN_WIDTH), break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = " " * margin
    for *cells, text in rows:
        wrapper.initial_indent = "  " + "".join(f"{cell:<{w}}  " for cell, w in zip(cells, widths, strict=True))
        yield from wrapper.wrap(text) or [wrapper.initial_indent.rstrip()]


def group_rows(group: str, default: str | None) -> Iterator[Row]:
    """Yield a group and its choices, the default first, each with the first comment of its file."""
    comments = {file.stem: _comment(file) for file in sorted((config_dir() / group).glob("*.yaml"))}
    own = "none of them" if default is None else comments.pop(default)
    plain = ", ".join(choice for choice, comment in comments.items() if not comment)
    yield group, default or "null", "; ".join(filter(None, (own, plain and f"or {plain}")))
    for choice, comment in comments.items():
        if comment:
            yield "", choice, comment


def _comment(file: Path) -> str:
    comment = re.search(r"^# (?!@package|python -m)(.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return comment[1] if comment else ""


def keys(schema: type, config: DictConfig, prefix: str = "") -> Iterator[Row]:
    """Yield the schema's keys, each with its value in the config and its meaning."""
    kinds = get_type_hints(schema)
    for entry in fields(schema):
        name, kind = f"{prefix}{entry.name}", kinds[entry.name]
        if is_dataclass(kind):
            yield from keys(cast(type, kind), config[entry.name], f"{name}.")
        elif entry.metadata:  # others are not typed
            names = choices(entry, kind)
            meaning = entry.metadata["meaning"] + (f"; one of {', '.join(names)}" if names else "")
            yield name, _typed(config, entry.name), meaning


def _typed(section: DictConfig, key: str) -> str:
    if OmegaConf.is_missing(section, key):
        return "required"
    value = OmegaConf.to_container(section, enum_to_str=True)[key]  # type: ignore[call-overload, index]
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return value if isinstance(value, str) else json.dumps(value)
