"""Texts on the command line, which are taken literally."""

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString, Sweep
from hydra.errors import HydraException

from llama_ft.cli.explain import TEXTS, setting_of
from llama_ft.config.checks import literal

RULE = (
    "A value is taken literally: ${...}, brackets and backslashes have no special meaning, and quotes around the whole"
    " value are removed. Commas outside quotes separate the items of a [list], and with -m the runs of a sweep."
)
BLANKS = " \t"  # around the items of a list; line breaks belong to a text
QUOTED = r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
ITEM = re.compile(rf"(?:^|,)(\s*{QUOTED}\s*(?=,|\Z)|[^,]*)", re.DOTALL)


def as_typed(arguments: Sequence[str], schema: type, *, sweeps: bool = False) -> list[str]:
    """Quote the texts in the arguments that Hydra or OmegaConf would otherwise interpret.

    Args:
        schema: tells which keys are texts, and which are lists of texts.
        sweeps: True if commas outside quotes separate the values of a sweep.
    """
    return [_argument(argument, schema, sweeps) for argument in arguments]


def parsed(arguments: Sequence[str]) -> list[Override]:
    """Parse arguments by Hydra; a HydraException for one that it cannot read."""
    return OverridesParser.create().parse_overrides(list(arguments))


def _value(argument: str) -> Any:
    """The value, or the sweep, that Hydra reads in an argument; None if it cannot read it."""
    try:
        return parsed([argument])[0].value()
    except HydraException:
        return None


def _argument(argument: str, schema: type, sweeps: bool) -> str:
    match = re.fullmatch(r"(\+{0,2}([\w.]+)=)(.*)", argument, re.DOTALL)
    kind = setting_of(schema, match[2])[1] if match else None
    if match is None or (kind not in TEXTS and kind != list[str]):
        return argument
    start, value = match[1], match[3]
    sweep = _value(argument) if sweeps or kind == list[str] else None
    is_simple = isinstance(sweep, ChoiceSweep) and sweep.simple_form and kind != list[str]
    if isinstance(sweep, Sweep | Glob) and not is_simple:
        return argument  # several lists, or choice(a,b), glob(*)
    if kind == list[str]:
        items = re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL)
        is_quoted = unquoted(value) != value
        if items is None and not is_quoted and ("," in value or re.match(rf"[{BLANKS}]*(\[|null\Z|\Z)", value, re.I)):
            return argument  # neither a list nor one item of it: refused
        texts = ITEM.findall(items[1]) if items and items[1].strip(BLANKS) else [] if items else [value]
        return f"{start}[{','.join(_text(text.strip(BLANKS)) for text in texts)}]"
    texts = [text.strip(BLANKS) for text in ITEM.findall(value)] if sweeps else [value]
    return start + ",".join(text if text.lower() in ("", "null") else _text(text) for text in texts)


def _text(value: str) -> str:
    text = unquoted(value)
    is_read = value and _value(f"key={value}") == text and not re.search(r"\$\{|\\", text)
    return value if is_read else QuotedString(literal(text), Quote.double).with_quotes()


def unquoted(value: str) -> str:
    """Remove the quotes around a whole text, and the backslashes that escape quotes inside it."""
    if not (match := re.fullmatch(rf"\s*({QUOTED})\s*", value, re.DOTALL)):
        return value
    quote, inner = match[1][0], match[1][1:-1]
    return re.sub(rf"\\+(?={quote}|\Z)", lambda run: "\\" * (len(run[0]) // 2), inner)
