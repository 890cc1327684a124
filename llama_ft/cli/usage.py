"""`--help`: a command's groups with their choices, its keys with their defaults and meanings.

Read from the schema and from `conf/`, so that it cannot differ from what the command does. Hydra's own help is
`--hydra-help`.
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
    "-m, --multirun": "a sweep: a run for each combination of the values that commas separate",
    "hydra.run.dir=DIR": "the folder of a run; else a new one in outputs/runs",
    "hydra.sweep.dir=DIR": "the folder of a sweep, which goes on where an earlier one in it stopped; else a new one in"
    " outputs/sweeps",
    "--help": "this text",
    "--version": "the version",
    "--cfg job": "print the resolved config, and do nothing",
    "--hydra-help": "Hydra's own options",
}
MIN_WIDTH = 27  # characters of a last column, however narrow the terminal is

Row = tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """What a command tells of itself."""

    name: str
    purpose: str
    arguments: str
    schema: type
    examples: tuple[str, ...]
    options: tuple[str, ...] = ("--help", "--version")  # of OPTIONS

    @property
    def module(self) -> str:
        """What follows `python -m`."""
        return f"llama_ft.{self.name}"


def print_help(usage: Usage, console: Console) -> None:
    """What `--help` prints."""
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
    console.print(text, soft_wrap=True)  # what is to be copied is neither cut nor broken


def table(rows: Iterable[Row], width: int) -> Iterator[str]:
    """The lines of a table; the last column, which is text, is wrapped to the width in characters."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    margin = sum(column + 2 for column in widths) + 2
    wrapper = textwrap.TextWrapper(max(width, margin + MIN_WIDTH), break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = " " * margin
    for *cells, text in rows:
        wrapper.initial_indent = "  " + "".join(f"{cell:<{w}}  " for cell, w in zip(cells, widths, strict=True))
        yield from wrapper.wrap(text) or [wrapper.initial_indent.rstrip()]


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
    comment = re.search(r"^# (?!@package|python -m)(.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return comment[1] if comment else ""


def keys(schema: type, config: DictConfig, prefix: str = "") -> Iterator[Row]:
    """The schema's keys, each with its value in the config and its meaning."""
    kinds = get_type_hints(schema)
    for entry in fields(schema):
        name, kind = f"{prefix}{entry.name}", kinds[entry.name]
        if is_dataclass(kind):
            yield from keys(cast(type, kind), config[entry.name], f"{name}.")
        elif entry.metadata:  # else it is no key to be typed
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
