"""Answers, and the lines in which `generate prompts=FILE` writes them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from llama_ft.files import Json


@dataclass(frozen=True)
class Answer:
    """The text generated after a prompt."""

    text: str
    n_tokens: int
    finish: str  # reason for its end: `eos`, `stop` (one of decoding.stop), or `length`


def added_keys(answers: Sequence[Answer], settings_hash: str, base_answers: Sequence[str] | None) -> Json:
    """The keys of a line besides those of its prompt's record: `answer` (several: `answers`), and others.

    `settings_hash` is of the settings and prompts that made the answers: equal for all lines of a file.
    """
    several = len(answers) > 1
    key = "answers" if several else "answer"
    columns = {
        f"base_{key}": base_answers,
        key: [answer.text for answer in answers],
        "finish": [answer.finish for answer in answers],
        "n_tokens": [answer.n_tokens for answer in answers],
    }
    values: Json = {name: list(c) if several else c[0] for name, c in columns.items() if c is not None}
    return values | {"settings_hash": settings_hash}


def texts_of_line(line: bytes, n_answers: int, settings_hash: str) -> list[str] | None:
    """The answers' texts in a line that was written with these settings; None for any other line."""
    try:
        content = json.loads(line)
        if content["settings_hash"] != settings_hash:
            return None
        return list(content["answers"]) if n_answers > 1 else [str(content["answer"])]
    except (ValueError, TypeError, KeyError):
        return None
