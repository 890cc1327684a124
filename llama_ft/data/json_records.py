"""Records from a JSON or JSONL file, each with its place in it."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_ft.config import UserError
from llama_ft.files import regular

# NaN is what pandas writes for a spreadsheet's empty cell.
_decoder = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))


def json_records(file: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(where, value) of each record; a JSON file is one array, anything else is read as one record a line.

    NaN is read as null. A value that is not valid JSON is the exception that says why. A file that is one object with
    one of the keys is one record; another object, or a file that cannot be read, is a UserError.
    """
    text = _text(file)
    whole = parse_json(text)
    if text.lstrip().startswith("["):
        if isinstance(whole, ValueError):
            raise UserError(f"{file} is not valid JSON: {whole}") from whole
        yield from ((f"record {index}", value) for index, value in enumerate(whole))
    elif isinstance(whole, dict):
        if whole.keys().isdisjoint(keys):
            raise UserError(f"{file} is one JSON object: it must be an array of records, or hold one record a line")
        yield "record 0", whole
    else:
        # Not splitlines(), which also splits at characters that a JSON string may hold. Files that were joined have a
        # byte-order mark at the start of each.
        stripped = ((number, line.lstrip("\ufeff")) for number, line in enumerate(text.split("\n"), start=1))
        lines = ((number, line) for number, line in stripped if line.strip())
        yield from ((f"record {index} (line {number})", parse_json(line)) for index, (number, line) in enumerate(lines))


def _text(file: Path) -> str:
    """A file's text without its byte-order mark."""
    try:
        text = regular(file).read_text(encoding="utf-8-sig")
        reason = "it holds zero bytes, as UTF-16 does" if "\0" in text else None
    except OSError as error:
        raise UserError(f"data file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        is_utf_16 = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        line = error.object.count(b"\n", 0, error.start) + 1
        reason = "it is UTF-16" if is_utf_16 else f"line {line} is not UTF-8 text"
    if reason:
        raise UserError(f"data file {file} cannot be read: {reason}; save it as UTF-8")
    return text


def parse_json(text: str) -> Any:
    """The value, or the ValueError that says why there is none."""
    try:
        return _decoder.decode(text)
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("it is nested too deeply")
