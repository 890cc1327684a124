"""Records from a JSON or JSONL file, each with its place in it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_ft.config import UserError
from llama_ft.files import Json, text_of

# NaN is what pandas writes for a spreadsheet's empty cell.
_decoder = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))


def json_records(file: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(where, value) of each record; a JSON file is one array, anything else is read as one record a line.

    NaN is read as null. A value that is not valid JSON is the ValueError that says why. A file that is one object with
    one of the keys is one record; another object, or a file that cannot be read, is a UserError.
    """
    text = text_of(file, f"data file {file}")
    whole = _parsed(text)
    if text.lstrip().startswith("["):
        if isinstance(whole, ValueError):
            raise UserError(f"{file} is {whole}") from whole
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
        for index, (number, line) in enumerate(lines):
            yield f"record {index} (line {number})", _parsed(line)


def _parsed(text: str) -> Any:
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")


def as_object(value: Any) -> Json:
    """The value of a record, if it is a JSON object; a ValueError, which may be the value, says why it is none."""
    if isinstance(value, ValueError):
        raise value
    if not isinstance(value, dict):
        raise ValueError(f'a record must be an object such as {{"instruction": "…"}}, not {type(value).__name__}')
    return value
