"""Records from a file of any kind, a folder or a data set on the hub: each with its place, one at a time."""

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
# NaN is what pandas writes for a spreadsheet's empty cell.
_decoder = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))

Line = tuple[int, str]  # its number, from 1, and its text with the line's end


def records_in(
    path: str | Path,
    keys: tuple[str, ...],
    columns: Mapping[str, str] | None = None,
    subset: str | None = None,
    split: str | None = None,
) -> Iterator[tuple[str, Any]]:
    """(where, value) of each record. A value that is not valid is the ValueError that says why.

    JSON is an array, which is parsed whole and takes several times its size; or one object that has one of the keys,
    which is one record; or an object a line (JSONL). JSONL, CSV and TSV are read a line at a time, also within .gz and
    .zst. Parquet, folders of the library `datasets` and `hub:ORG/NAME[@REVISION]` stay on the disk, as Arrow has them.
    NaN and empty cells are null; all other cells of CSV and TSV are texts.

    Args:
        columns: other names that keys of ours have there.
        subset, split: of a folder or a data set on the hub, where it has several.

    Raises:
        UserError: if it cannot be read, is an object of other keys, or lacks a column that is named.
    """
    columns = columns or {}
    values = partial(_values, str(path), (*keys, *columns.values()), subset, split)
    if not columns:
        return values()
    _check_columns(path, values(), columns)
    return ((where, _renamed(value, columns)) for where, value in values())


def as_object(value: Any) -> Json:
    """The value of a record, if it is a JSON object; a ValueError, which may be the value, says why it is none."""
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
            raise UserError(f"data.{key}={value}: {file} is one file, and has none; leave it out")
    kind = (file.with_suffix("") if file.suffix.lower() in PACKED else file).suffix.lower()
    return _table(file, DELIMITERS[kind]) if kind in DELIMITERS else _json(file, keys)


def _renamed(value: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(value, dict):
        return value
    renamed = {*columns, *columns.values()}  # their names go too: by its keys a record's kind is known
    others = {key: part for key, part in value.items() if key not in renamed}
    return others | {ours: value[theirs] for ours, theirs in columns.items() if theirs in value}


def _check_columns(path: str | Path, values: Iterator[tuple[str, Any]], columns: Mapping[str, str]) -> None:
    """Raise a UserError unless each column is in a record: most often in the first, so that no other is read."""
    there: dict[str, None] = {}  # in their order
    for _, value in values:
        there |= dict.fromkeys(value if isinstance(value, dict) else ())
        if there.keys() >= {*columns.values()}:
            return
    ours, theirs = next(item for item in columns.items() if item[1] not in there)
    raise UserError(f"data.columns has {ours}: {theirs}, and no record of {path} does: there are {', '.join(there)}")


# Lines


def _opened(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(regular(file)))
    if file.suffix.lower() == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(f"{file} needs the package pyarrow: pip install 'llama_ft[data]'") from error
        # Unlike zstandard's, this reader knows a file that was cut short.
        return io.BufferedReader(pyarrow.CompressedInputStream(str(regular(file)), "zstd"))
    return regular(file).open("rb")


def _lines(file: Path) -> Iterator[Line]:
    """The lines, which end at line feeds alone, without the byte-order marks before them: joined files have several."""
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
    if isinstance(whole, ValueError) and ".jsonl" not in file.suffixes:  # it may be one object over several lines
        held += lines
        whole = _parsed("".join(line for _, line in held))
    else:
        held += islice(filled, 1)
        whole = whole if len(held) == 1 else None
    if isinstance(whole, dict):
        if whole.keys().isdisjoint(keys):
            raise UserError(f"{file} is one JSON object: it must be an array of records, or hold one record a line")
        yield "record 0", whole
        return
    for index, (number, line) in enumerate(each for each in chain(held, lines) if each[1].strip()):
        yield f"record {index} (line {number})", _parsed(line.rstrip("\n"))


def _array(file: Path, text: str, lines: Iterator[Line]) -> Iterator[tuple[str, Any]]:
    for _, line in lines:
        text += line  # in place: nobody else holds it
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
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of 131,072 characters
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
        return ValueError(f"{len(cells)} cells stand under {len(header)} columns: {', '.join(header)}")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}
