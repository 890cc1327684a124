"""Results of a file of prompts: a line of JSON each, written as they come, to go on from where they stop."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from llama_ft.config import GenerateConfig, UserError
from llama_ft.config.content import content_hash
from llama_ft.data.json_records import parse_json
from llama_ft.decoding.prompts import Prompt
from llama_ft.files import try_lock, write_text

Record = dict[str, Any]


class Results(Protocol):
    """Where results go."""

    kept: list[Record]
    """Those that are there: of the first prompts, in their order."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...

    def write(self, result: Record) -> None:
        """Add a result."""

    def remove(self) -> None:
        """Let nothing be left."""


def settings_of(config: GenerateConfig, dtype: str, prompts: Sequence[Prompt]) -> Record:
    """What makes the answers what they are. Where files lie is not part of it, nor what changes speed and memory only.

    Args:
        dtype: that of the arithmetic, after `auto` has been resolved.
    """
    values: Record = {f"decoding.{key}": value for key, value in asdict(config.decoding).items()}
    values |= {f"model.{key}": value for key, value in asdict(config.model).items()}
    sources = {"checkpoint": config.checkpoint, "tokenizer": str(config.tokenizer_file), "adapter": config.adapter}
    sources["base"] = (config.base or config.checkpoint) if config.compare else None
    builtin = {"builtin": str(config.model.builtin_dir)}
    values |= {key: content_hash(builtin.get(name, name)) if name else None for key, name in sources.items()}
    records = json.dumps([prompt.record for prompt in prompts])
    digest = hashlib.sha256(records.encode()).hexdigest()
    return values | {"dtype": dtype, "compare": config.compare, "prompts": digest}


class ResultsFile:
    """A JSONL file of results, and beside it FILE.settings.json, which says what they were made with.

    One process at a time writes into it. Complete lines are kept, if they are of the same prompts and settings; a last
    line without its end is dropped. Nothing is left of a file into which nothing was written.
    """

    def __init__(self, file: Path, settings: Record, prompts: Sequence[Prompt], added: Collection[str]) -> None:
        """Name the file; nothing is read yet. `added` are the keys that results have beside their prompts' own."""
        self.file, self._settings, self._prompts, self._added = file, settings, prompts, set(added)
        self._settings_file = file.with_name(f"{file.name}.settings.json")
        self.kept: list[Record] = []

    def __enter__(self) -> Self:
        """Open the file, and read what is in it.

        Raises:
            UserError: if it cannot be written, or is not one that this can be written into.
        """
        with self._explained():
            if self.file.exists() and not self.file.is_file():
                raise UserError(f"output={self.file}: it must be a file")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is either written or refused, with nothing left that closing would write again.
            self._stream = self.file.open("ab", buffering=0)
            try:
                self._go_on()
            except BaseException:
                self._stream.close()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._explained():
            if os.fstat(self._stream.fileno()).st_size == 0:
                self.remove()
            self._stream.close()

    def write(self, result: Record) -> None:
        """Add a line; it is in the file when this returns.

        Raises:
            UserError: if it cannot be written.
        """
        line = _line(result).encode()
        with self._explained():
            while line:
                line = line[self._stream.write(line) :]
        self.kept.append(result)

    def remove(self) -> None:
        """Remove the file and what belongs to it."""
        self._settings_file.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"output={self.file} cannot be written: {error.strerror}") from error

    def _go_on(self) -> None:
        if not try_lock(self._stream):
            raise UserError(f"output={self.file}: another process is writing into it")
        content = self.file.read_bytes()
        if not content:
            write_text(self._settings_file, json.dumps(self._settings, indent=2) + "\n")
            return
        self._check_settings()
        complete = content[: content.rfind(b"\n") + 1]
        self.kept = [self._checked(number, line) for number, line in enumerate(complete.split(b"\n")[:-1], start=1)]
        self._stream.truncate(len(complete))

    def _check_settings(self) -> None:
        try:
            found = json.loads(self._settings_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise self._refused(f"exists, and {self._settings_file.name}, which tells what it is, does not")
        expected = json.loads(json.dumps(self._settings))
        if others := [key for key in {**expected, **found} if found.get(key) != expected.get(key)]:
            raise self._refused(f"was made with other {', '.join(others)} ({self._settings_file.name} says with which)")

    def _checked(self, number: int, line: bytes) -> Record:
        """A complete line, which must be the result of the prompt at its place."""
        result = parse_json(line.decode(errors="replace"))
        if isinstance(result, dict) and number <= len(self._prompts):
            own = self._prompts[number - 1].record
            if own.items() <= result.items() and result.keys() - own.keys() == self._added:
                return result
        raise self._refused(f"has something else than the result of prompt {number} in line {number}")

    def _refused(self, reason: str) -> UserError:
        return UserError(f"output={self.file} {reason}: name another output, or remove that one")


class Printed:
    """Results that no file is given for: printed, or just kept."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self.kept: list[Record] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def write(self, result: Record) -> None:
        """Print a line."""
        if self._is_shown:
            print(_line(result), end="", flush=True)
        self.kept.append(result)

    def remove(self) -> None:
        """There is nothing."""


def _line(result: Record) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"
