"""Records from a JSON or JSONL file, each with its place in it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_ft.config import UserError
from llama_ft.files import regular


def json_records(file: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(where, value) of each record; a JSON file is one array, anything else is read as one record a line.

    A value that is not valid JSON is the exception that says why. A file that is one object with one of the keys is
    one record; another object, or a file that cannot be read, is a UserError.
    """
    try:
        text = regular(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"data file {file} cannot be read: {reason}") from error
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
        # Not splitlines(), which also splits at characters that a JSON string may hold.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        yield from ((f"record {index} (line {number})", parse_json(line)) for index, (number, line) in enumerate(lines))


def parse_json(text: str) -> Any:
    """The value, or the ValueError that says why there is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        return error
