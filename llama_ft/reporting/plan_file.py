"""`plan.json` as it is read: checked, so that whoever shows it can rely on what it holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ft.config import UserError
from llama_ft.records import CATEGORIES
from llama_ft.records.result import RESULT_FILE
from llama_ft.reporting.results import TECHNIQUES

PLAN_FILE = "plan.json"
SCHEMA_VERSION = 1

Plan = dict[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Maybe:
    """Null, or of this shape."""

    shape: Any


@dataclass(frozen=True)
class Each:
    """An object of any names, with values of this shape."""

    shape: Any


NUMBER = (int, float)
MEMORY = dict.fromkeys(CATEGORIES, NUMBER)
CELL = {"arrow": str, "before": NUMBER, "after": NUMBER, "unit": str}
TABLE1_COLUMNS = (*CATEGORIES[:-1], "computation")
TABLE1 = {
    "baseline": str,
    "rows": [{"technique": str, "name": str, "choice": str, "cells": dict.fromkeys(TABLE1_COLUMNS, CELL)}],
    "notes": [str],
}
ROW = {"optim": dict.fromkeys(TECHNIQUES, bool), "combination": str, "gpu": str, "error": Maybe(str)}
NUMBERS = (
    "reserved_mib required_mib total_memory_mib margin_mib context_mib trainable_params total_params steps samples"
    " tokens bytes_moved runtime_s tokens_per_s"
).split()
PLANNED_ROW = dict.fromkeys(NUMBERS, Maybe(NUMBER)) | {
    "peak_memory_mib": NUMBER,
    "phase": str,
    "memory_mib": MEMORY,
    "memory_max_mib": MEMORY,
    "breakdown": [{"category": str, "dtype": str, "mb": NUMBER}],
    "fits": Maybe(bool),
    "flops": Maybe(Each(NUMBER)),
    "binds": Maybe(str),
    "bound_s": Maybe(Each(NUMBER)),
    "timeline": [{"event": NUMBER, "phase": str, "memory_mib": MEMORY}],
}
PLAN = {
    "command": str,
    "versions": Each(Maybe(str)),
    "model": str,
    "data": {"name": str, "about": str, "is_stand_in": bool, "samples": int, "longest": int, "tokens": int},
    "techniques": {
        "ga": {"steps": int},
        "mp": {"frozen_weights": str, "trainable_weights": str},
        "lora": Each(object),
        "gc": Each(object),
    },
    "training": {"micro_batch_size": int, "epochs": int},
    "gpus": [{"name": str, "device": str, "memory_mib": Maybe(NUMBER), "context_mib": NUMBER}],
    "time": {"kind": str, "about": str},
    "table1": Maybe(TABLE1),
    "advice": Maybe({"goal": str, "gpu": Maybe(str), "lines": [str]}),
    "rows": [ROW],
}


def is_plan(folder: Path) -> bool:
    """Whether a folder is a plan's: it has `plan.json`, and no run in it or below it."""
    return (folder / PLAN_FILE).is_file() and next(folder.rglob(RESULT_FILE), None) is None


def read_plan(folder: Path) -> Plan:
    """What a folder's `plan.json` holds.

    Raises:
        UserError: naming the file, if it cannot be read or is no plan of this version.
    """
    file = folder / PLAN_FILE
    try:
        plan = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refused)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    version = plan.get("schema_version") if isinstance(plan, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(f"{file} is not a plan that this version writes (schema_version {SCHEMA_VERSION})")
    if (wrong := problem(plan, PLAN) or _problem_of_rows(plan)) is not None:
        raise UserError(f"{file} is damaged: {wrong}; `python -m llama_ft.plan` writes it anew")
    return dict(plan)


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _problem_of_rows(plan: Plan) -> str | None:
    """What is wrong with the rows of a plan whose shape is right elsewhere."""
    for number, row in enumerate(plan["rows"]):
        if row["error"] is None and (wrong := problem(row, PLANNED_ROW, f"rows[{number}].")) is not None:
            return wrong
    names = [gpu["name"] for gpu in plan["gpus"]]
    found = [(row["gpu"], row["combination"]) for row in plan["rows"]]
    combinations = dict.fromkeys(combination for _, combination in found)
    if not found or len(set(found)) != len(found) or set(found) != {(gpu, c) for gpu in names for c in combinations}:
        return "rows are not one for each combination on each of gpus"
    return None


def problem(value: Any, shape: Any, where: str = "") -> str | None:
    """The first place where a value is not of a shape, in words; None where all is right.

    Args:
        shape: a type or several; a list of one shape; names with their shapes, beside which there may be others; None
            is allowed by `Maybe` alone.
        where: what the value belongs to, with a dot or nothing at its end.
    """
    name = where.rstrip(".")
    if isinstance(shape, Maybe):
        return None if value is None else problem(value, shape.shape, where)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        return _first(problem(each, shape[0], f"{name}[{number}].") for number, each in enumerate(value))
    if isinstance(shape, dict | Each):
        if not isinstance(value, dict):
            return f"{name} is no object"
        inner = shape if isinstance(shape, dict) else dict.fromkeys(value, shape.shape)
        if missing := [key for key in inner if key not in value]:
            return f"{where}{missing[0]} is missing"
        return _first(problem(value[key], inner[key], f"{where}{key}.") for key in inner)
    is_flag = isinstance(value, bool) and shape not in (bool, object)  # to Python a bool is an int
    return f"{name} is {json.dumps(value)[:40]}" if is_flag or not isinstance(value, shape) else None


def _first(found: Any) -> str | None:
    return next((each for each in found if each is not None), None)


def rows_on(plan: Plan, gpu: str) -> Rows:
    """The rows of a card, in the plan's order."""
    return [row for row in plan["rows"] if row["gpu"] == gpu]


def baseline_of(rows: Rows) -> dict[str, Any] | None:
    """The row with every technique off, if the card can run it."""
    return next((row for row in rows if row["combination"] == "baseline" and not row["error"]), None)
