"""Answers a file of prompts with one line of JSON each, in order, written at once so that a stopped run can resume.

One model answers, or two are compared, of which only one is in memory at a time.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict

from llama_ft.config import GenerateConfig, UserError, path_of
from llama_ft.config.content import content_hash
from llama_ft.decoding.generate import LoadFn
from llama_ft.decoding.prompts import Prompt
from llama_ft.files import explained, try_lock
from llama_ft.records.answers import Answer, added_keys, texts_of_line
from llama_ft.system import Log, Progress, silent


def answer_keys(config: GenerateConfig) -> set[str]:
    """The keys that a line has in addition to those of its prompt's record."""
    n_answers = config.decoding.num_return_sequences
    base_answers = [""] * n_answers if config.compare else None
    return set(added_keys([Answer("", 0, "")] * n_answers, "", base_answers))


def settings_hash(config: GenerateConfig, dtype: str, prompts: Sequence[Prompt]) -> str:
    """A hash of all settings that affect the answers: not of the places of files, nor of speed and memory settings."""
    base = (config.base or config.checkpoint) if config.compare else None
    names = [config.checkpoint, str(config.tokenizer_file), config.adapter, base]
    builtin = {"builtin": str(config.model.builtin_dir)}
    files = [content_hash(builtin.get(name, name)) if name else None for name in names]
    # Not the prompts' texts: a template may put the date in them.
    asked = [(prompt.record, prompt.template) for prompt in prompts], config.system
    settings = [asdict(config.decoding), config.model.sizes, files, dtype, config.compare, asked]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


Texts = list[list[str]]  # the answers of each existing line
Write = Callable[[str], object]  # appends a line
Lines = tuple[Texts, Write]


@contextmanager
def lines_of_file(name: str, made_with: str, prompts: Sequence[Prompt], n_answers: int) -> Iterator[Lines]:
    """Open a file to continue after its last whole line. Only one process writes into it; an empty file is removed.

    A UserError if it cannot be written, another process writes into it, or its lines have other prompts or settings,
    by the hash that they are `made_with`.
    """
    file = path_of(name)
    if file.exists() and not file.is_file():
        raise UserError(f"output={file}: it must be a file")
    cannot = f"output={file} cannot be written"
    with explained(cannot):
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("ab", buffering=0)  # so that closing has nothing left to write

    def write(line: str) -> None:
        rest = line.encode()
        with explained(cannot):
            while rest:
                rest = rest[stream.write(rest) :]

    with stream:
        if not try_lock(stream):
            raise UserError(f"output={file}: another process is writing into it")
        *whole, rest = file.read_bytes().split(b"\n")
        answered = [texts for line in whole if (texts := texts_of_line(line, n_answers, made_with)) is not None]
        # A truncated line is recognized as ours only by the lines before it, or by its beginning.
        is_ours = bool(whole) or _may_begin(rest, prompts)
        if not len(answered) == len(whole) <= len(prompts) or not is_ours:
            reason = f"output={file} was made with other prompts or settings"
            raise UserError(f"{reason}: name another output, or remove this one")
        stream.truncate(stream.tell() - len(rest))
        try:
            yield answered, write
        finally:
            if not answered:
                file.unlink(missing_ok=True)


def _may_begin(part: bytes, prompts: Sequence[Prompt]) -> bool:
    """Return True if a part of a line, possibly empty, may be the beginning of the first line."""
    record = json.dumps(prompts[0].record, ensure_ascii=False) if prompts else ""
    begin = f'{record[:-1]}, "'.encode()
    return begin.startswith(part) or part.startswith(begin)


def print_line(line: str) -> None:
    """Print a line of JSON, with JSON's escapes if standard output's encoding lacks one of its letters."""
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(json.loads(line)) + "\n"
    print(line, end="", flush=True)


def answer_prompts(
    config: GenerateConfig, prompts: Sequence[Prompt], dtype: str, load: LoadFn, progress: Progress, log: Log
) -> None:
    """Answer the prompts that have no line in `config.output`, or print all; a UserError if its prompts differ."""
    made_with = settings_hash(config, dtype, prompts)

    def lines_for(suffix: str = "") -> AbstractContextManager[Lines]:
        if config.output is None:
            return nullcontext(([], silent if suffix else print_line))
        return lines_of_file(config.output + suffix, made_with, prompts, config.decoding.num_return_sequences)

    def fill(texts: Texts, write: Write, is_base: bool, base_texts: Texts | None = None) -> None:
        if not (rest := prompts[len(texts) :]):
            return
        answer = load(is_base)
        with progress("answers of the base model" if is_base else "answers", len(rest)) as advance:
            for start in range(0, len(rest), config.batch_size):
                batch = rest[start : start + config.batch_size]
                for prompt, answers in zip(batch, answer([prompt.text for prompt in batch], silent), strict=True):
                    base = base_texts[len(texts)] if base_texts is not None else None
                    line = prompt.record | added_keys(answers, made_with, base)
                    write(json.dumps(line, ensure_ascii=False) + "\n")
                    texts.append([answer.text for answer in answers])
                advance(len(batch))

    with lines_for() as (texts, write):
        try:
            if config.compare and len(texts) < len(prompts):
                with lines_for(".base") as (base_texts, write_base):
                    fill(base_texts, write_base, True)
                    fill(texts, write, False, base_texts)
                    base_texts.clear()  # so that the file is removed
            fill(texts, write, False)
        finally:
            if config.output is not None and texts:
                log(f"{len(texts)} of {len(prompts)} prompts are answered in {config.output}")
