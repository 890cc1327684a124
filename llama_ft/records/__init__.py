"""Records of runs and plans: dataclasses that are written to JSON files and read back, without torch."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from llama_ft.config import UserError
from llama_ft.files import read_json, write_json

SCHEMA_VERSION = 2  # of every record that has its own file
CATEGORIES = ("parameter", "gradient", "optimizer_state", "activation", "gathered", "other")  # of memory

GATHERED = "gathered"  # only in runs that are split over processes

R = TypeVar("R")

_adapter = cache(TypeAdapter)  # making one takes milliseconds


def shown_categories(memories: Iterable[Mapping[str, float] | None]) -> tuple[str, ...]:
    """The categories to show: `gathered` only if there is any."""
    is_there = any((memory or {}).get(GATHERED) for memory in memories)
    return tuple(name for name in CATEGORIES if is_there or name != GATHERED)


def parse(kind: type[R], content: Any, where: str) -> R:
    """Parse a record from JSON types; a UserError names `where` it is, and the wrong version or first wrong field."""
    version = content.get("schema_version", SCHEMA_VERSION) if isinstance(content, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise UserError(f"{where} has schema_version {version}, and this version reads {SCHEMA_VERSION}: run it again")
    try:
        record: R = _adapter(kind).validate_python(content)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        raise UserError(f"{where} is damaged: {field or 'the record'}: {first['msg'].lower()}") from error
    return record


def read_record(kind: type[R], file: Path) -> R:
    """Read a record from its file; a UserError if the file cannot be read or contains something else."""
    return parse(kind, read_json(file, "what was measured or planned"), str(file))


def write_record(record: Any, file: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    write_json(file, asdict(record))
