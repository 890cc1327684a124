"""Reads records, each with its place, from a file of any kind, a folder or a data set on the hub."""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from llama_ft.config import UserError
from llama_ft.data.arrow_records import arrow_rows
from llama_ft.files import Json, explained, regular
from llama_ft.hub import is_hub_name

PACKED = (".gz", ".zst")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# pandas writes NaN for a spreadsheet's empty cell.
_decoder = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))

Line = tuple[int, str]  # its number, from 1, and its text with the line ending


def records_in(
    path: str | Path,
    keys: tuple[str, ...],
    columns: Mapping[str, str] | None = None,
    subset: str | None = None,
    split: str | None = None,
) -> Iterator[tuple[str, Any]]:
    """(where, value) of each record. An invalid value is yielded as the ValueError that explains it.

    JSON is an array, which is parsed whole and costs several times its size in memory; or a single record, an object
    with one of the keys; or one object per line (JSONL). JSONL, CSV and TSV are read line by line, also within .gz and
    .zst. Parquet, folders of the library `datasets` and `hub:ORG/NAME[@REVISION]` stay on disk, mapped by Arrow. NaN
    and empty cells are null; all other cells of CSV and TSV are texts.

    Args:
        columns: their names for our keys.
        subset, split: of a folder or a data set on the hub that has several.

    Raises:
        UserError: if the data cannot be read, are an object with other keys, or lack a column that is named.
    """
    columns = columns or {}
    values = partial(_values, str(path), (*keys, *columns.values()), subset, split)
    if not columns:
        return values()
    _check_columns(path, values(), columns)
    return ((where, _renamed(value, columns)) for where, value in values())


def as_object(value: Any) -> Json:
    """Return a record's value if it is a JSON object; raise a ValueError otherwise, or if the value is one."""
    if isinstance(value, ValueError):
        raise value
    if not isinstance(value, dict):
        raise ValueError(f'a record must be an object such as {{"instruction": "…"}}, not {type(value).__name__}')
    return value


def _values(name: str, keys: Iterable[str], subset: str | None, split: str | None) -> Iterator[tuple[str, Any]]:
    file = Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not file.parent.exists():
        raise UserError(f"data file {name}: there is no such file; a data set on the Hugging Face hub is hub:{name}")
    if is_hub_name(name) or file.is_dir() or file.suffix.lower() == ".parquet":
        return arrow_rows(name, subset, split)
    for key, value in (("subset", subset), ("split", split)):
        if value is not None:
            raise UserError(f"data.{key}={value}: {file} is a single file without {key}s; leave data.{key} out")
    kind = (file.with_suffix("") if file.suffix.lower() in PACKED else file).suffix.lower()
    return _table(file, DELIMITERS[kind]) if kind in DELIMITERS else _json(file, keys)


def _renamed(value: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(value, dict):
        return value
    renamed = {*columns, *columns.values()}  # their names are removed too: a record's keys tell its kind
    others = {key: part for key, part in value.items() if key not in renamed}
    return others | {ours: value[theirs] for ours, theirs in columns.items() if theirs in value}


def _check_columns(path: str | Path, values: Iterator[tuple[str, Any]], columns: Mapping[str, str]) -> None:
    """Raise a UserError unless each column is in some record; usually only the first needs to be read."""
    found: dict[str, None] = {}  # an ordered set
    for _, value in values:
        found |= dict.fromkeys(value if isinstance(value, dict) else ())
        if found.keys() >= {*columns.values()}:
            return
    ours, theirs = next(item for item in columns.items() if item[1] not in found)
    raise UserError(f"data.columns has {ours}: {theirs}, but {path} has no {theirs}; it has {', '.join(found)}")


# Lines


def _opened(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(regular(file)))
    if file.suffix.lower() == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(f"{file} needs the package pyarrow: pip install 'llama_ft[data]'") from error
        # Unlike zstandard's, this reader detects a truncated file.
        return io.BufferedReader(pyarrow.CompressedInputStream(str(regular(file)), "zstd"))
    return regular(file).open("rb")


def _lines(file: Path) -> Iterator[Line]:
    """The lines, split only at line feeds, without byte-order marks, of which concatenated files have several."""
    with explained(f"data file {file} cannot be read"), _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode().lstrip("\ufeff")
            except UnicodeDecodeError as error:
                problem = f"line {number} is not UTF-8 text; save it as UTF-8"
                raise UserError(f"data file {file} cannot be read: {problem}") from error
            yield number, text


# JSON


def _json(file: Path, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    lines = _lines(file)
    filled = (each for each in lines if each[1].strip())
    number, first = next(filled, (1, ""))
    if first.lstrip().startswith("["):
        yield from _array(file, "\n" * (number - 1) + first, lines)
        return
    held, whole = [(number, first)], _parsed(first)
    if isinstance(whole, ValueError) and ".jsonl" not in file.suffixes:  # perhaps one object over several lines
        held += lines
        whole = _parsed("".join(line for _, line in held))
    else:
        held += islice(filled, 1)
        whole = whole if len(held) == 1 else None
    if isinstance(whole, dict):
        if whole.keys().isdisjoint(keys):
            raise UserError(f"{file} is one JSON object: it must be an array of records, or hold one record per line")
        yield "record 0", whole
        return
    for index, (number, line) in enumerate(each for each in chain(held, lines) if each[1].strip()):
        yield f"record {index} (line {number})", _parsed(line.rstrip("\n"))


def _array(file: Path, text: str, lines: Iterator[Line]) -> Iterator[tuple[str, Any]]:
    for _, line in lines:
        text += line  # in place, since nothing else references it
    whole = _parsed(text)
    if isinstance(whole, ValueError):
        raise UserError(f"{file} is {whole}") from whole
    del text
    yield from ((f"record {index}", value) for index, value in enumerate(whole))


def _parsed(text: str) -> Any:
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")


# CSV and TSV


def _table(file: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default rejects a text of 131,072 characters
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if twice := {name for name in header if header.count(name) > 1}:
            raise UserError(f"{file} has two columns {min(twice)}: rename one of them")
        index, number = 0, reader.line_num + 1
        for cells in reader:
            if cells:  # the line is not blank
                yield f"record {index} (line {number})", _row(header, cells)
                index += 1
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}") from error


def _row(header: list[str], cells: list[str]) -> Json | ValueError:
    if len(cells) != len(header):
        return ValueError(f"it has {len(cells)} cells for {len(header)} columns: {', '.join(header)}")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}
