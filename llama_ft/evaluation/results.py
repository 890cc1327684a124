"""What an evaluation leaves behind: `evaluate.json` and `answers.jsonl`."""

import enum
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from llama_ft.config import EvaluateConfig
from llama_ft.evaluation.exact_match import accuracy, matches
from llama_ft.evaluation.measures import EvalInputs, Measured

SCHEMA_VERSION = 1


def evaluation_result(
    config: EvaluateConfig, material: EvalInputs, measured: dict[str, Measured], about: dict[str, Any]
) -> dict[str, Any]:
    """The content of `evaluate.json`, in plain JSON types.

    Args:
        measured: by role: `model`, or `base` and `fine_tuned`.
        about: what else is known of the run, such as device and versions.
    """
    records, text = material.records, material.text
    data = {
        "name": records.file.name if config.data.path else config.data.name,
        "file": records.file.name if records.is_held_out else str(records.file),  # the package's place says nothing
        "is_held_out": records.is_held_out,
        "records": len(records.questions),
        "skipped": records.n_skipped,
        "truncated": records.n_truncated,
        "dropped": records.n_dropped,
    }
    about_text = None
    if text is not None:
        about_text = {"file": str(text.file), "bytes": text.n_bytes, "tokens": len(text.tokens) - 1}
        about_text |= {"window": config.window_tokens, "stride": config.stride_tokens}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": config.model.name,
        "data": data,
        "text": about_text,
        "max_new_tokens": config.max_new_tokens,
        "models": [_source(config, role) | found.values for role, found in measured.items()],
        "majority": _majority(material) if config.exact_match else None,
        "settings": asdict(config, dict_factory=_plain),
        **about,
    }


def answer_lines(material: EvalInputs, measured: dict[str, Measured]) -> Iterator[str]:
    """The lines of `answers.jsonl`: each record with the answers to it, as they came, and whether they are correct."""
    for place, question in enumerate(material.records.questions):
        record = question.record
        line: dict[str, Any] = {"instruction": record.instruction, "input": record.input, "task": question.task}
        line["expected"] = record.output
        for role, found in measured.items():
            line |= {f"{role}_answer": found.answers[place].text, f"{role}_correct": found.correct[place]}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _source(config: EvaluateConfig, role: str) -> dict[str, Any]:
    """Which weights a role has, as they were given."""
    if role == "base":
        return {"role": role, "checkpoint": config.base or config.checkpoint, "adapter": None}
    return {"role": role, "checkpoint": config.checkpoint, "adapter": config.adapter}


def _majority(material: EvalInputs) -> dict[str, Any]:
    """How far the most frequent answer of each task goes."""
    records = material.records
    guesses = [records.majority.get(question.task, "") for question in records.questions]
    pairs = zip(guesses, records.questions, strict=True)
    correct = [matches(guess, question.record.output) for guess, question in pairs]
    found = accuracy([question.task for question in records.questions], correct)
    return {"of": "training split" if records.is_held_out else "same records", "answers": records.majority} | found


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value.name if isinstance(value, enum.Enum) else value for key, value in items}
