"""Instruction records from JSON or JSONL files, and the tokenized samples made of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from math import isnan
from pathlib import Path
from statistics import median

from llama_ft.config import DataConfig, OnBadRecord, TrainConfig, UserError
from llama_ft.data.download import fetch
from llama_ft.data.json_records import as_object, json_records
from llama_ft.data.prompt import prompt_text
from llama_ft.data.tokenizer import Tokenizer, load_tokenizer
from llama_ft.system import Pace

Log = Callable[[str], None]
SAMPLE_DIR = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Record:
    """One instruction with its answer."""

    instruction: str
    input: str
    output: str
    task: str = ""  # by which evaluation groups records; may be missing


@dataclass(frozen=True)
class Sample:
    """A tokenized record: BOS, prompt, answer, EOS. The first `n_prompt` tokens are not trained on."""

    tokens: list[int]
    n_prompt: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Number of tokens that are trained on."""
        return len(self.tokens) - self.n_prompt


@dataclass(frozen=True)
class Dataset:
    """The samples of a run, and what became of the records they come from."""

    samples: list[Sample]
    n_skipped: int  # bad records left out, where `data.on_bad_record=skip`
    n_truncated: int  # samples cut to the longest length allowed
    n_dropped: int  # samples of which the cut left no answer to train on
    ends: str = ""  # where they begin and end, for people

    def describe(self) -> str:
        """One line for people."""
        lengths = [len(sample) for sample in self.samples]
        trained = sum(sample.n_targets for sample in self.samples)
        text = f"{len(lengths)} samples, {sum(lengths):,} tokens (median {median(lengths):g}, longest {max(lengths)})"
        text += f", {trained / sum(lengths):.0%} of them trained on"
        notes = {"bad records skipped": self.n_skipped, "truncated": self.n_truncated, "dropped": self.n_dropped}
        return text + "".join(f"; {count} {what}" for what, count in notes.items() if count)


class NothingLeft(UserError):
    """Every sample was cut before its answer."""


def silent(line: str) -> None:
    """Say nothing."""


def load_data(config: TrainConfig, log: Log = silent) -> Dataset:
    """The run's samples; a UserError also if the tokenizer is not the model's."""
    return load_dataset(config.data, load_tokenizer(config), config.max_length, config.training.max_samples, log)


def load_dataset(
    config: DataConfig, tokenizer: Tokenizer, max_length: int, max_samples: int | None, log: Log = silent
) -> Dataset:
    """Tokenize the records of a run, downloaded where needed; a UserError if a record is bad, or no sample is left."""
    path = records_file(config, log)
    records, n_skipped = read_records(path, config.on_bad_record, config.first)
    encoded, wanted, pace = list[Sample](), records[:max_samples], Pace()
    for record in wanted:
        encoded.append(encode_record(record, tokenizer))
        if pace.is_due():
            log(f"data: {len(encoded):,} of {len(wanted):,} records tokenized")
    samples = [Sample(sample.tokens[:max_length], sample.n_prompt) for sample in encoded]
    n_truncated = sum(len(sample) > max_length for sample in encoded)
    kept = [sample for sample in samples if sample.n_targets > 0]
    if not kept:
        if samples:
            raise NothingLeft(f"{path}: max_length={max_length} leaves no answer to train on")
        raise UserError(f"{path}: there are no records")
    return Dataset(kept, n_skipped, n_truncated, len(samples) - len(kept), tokenizer.describe_ends())


def records_file(config: DataConfig, log: Log = silent) -> Path:
    """The file of a data set: the user's own if given, else the download if there is a URL, else the built-in."""
    if config.path:
        return Path(os.path.expanduser(config.path))
    if config.url:
        return fetch(config.url, config.git_blob_id, config.cache_dir, log)
    return SAMPLE_DIR / "train.jsonl"


def read_records(path: Path, on_bad_record: OnBadRecord, first: int | None = None) -> tuple[list[Record], int]:
    """The first records of a JSON or JSONL file, and how many bad ones were skipped; a UserError if they may not be."""
    records, n_skipped, first_reason = list[Record](), 0, ""
    for where, value in islice(json_records(path, ("instruction",)), first):
        try:
            records.append(as_record(value))
        except ValueError as error:
            if on_bad_record is OnBadRecord.error:
                advice = "data.on_bad_record=skip leaves such records out"
                raise UserError(f"{path}, {where}: {error}. {advice}") from error
            n_skipped, first_reason = n_skipped + 1, first_reason or f"{where}: {error}"
    if n_skipped and not records:
        raise UserError(f"{path}: all {n_skipped} records are bad, the first is {first_reason}")
    return records, n_skipped


def encode_record(record: Record, tokenizer: Tokenizer) -> Sample:
    """Tokenize prompt and answer as one text, as the Alpaca repository does, and find where the answer begins.

    The tokens that the prompt alone and the whole text share are the prompt; where a piece spans the border, it counts
    as answer, so that no token of the answer goes untrained.
    """
    prompt = prompt_text(record.instruction, record.input)
    prompt_ids = tokenizer.encode(prompt, bos=True)
    tokens = tokenizer.encode(prompt + record.output, bos=True, eos=True)
    pairs = zip(prompt_ids, tokens, strict=False)
    return Sample(tokens, next((n for n, (one, other) in enumerate(pairs) if one != other), len(prompt_ids)))


def as_record(value: object) -> Record:
    """The record in a JSON value; a ValueError says what is wrong with it."""
    record = as_object(value)
    # Null and NaN, which pandas makes of a spreadsheet's empty cell, are no values.
    given = {
        key: part for key, part in record.items() if part is not None and not (type(part) is float and isnan(part))
    }
    texts = {"input": ""} | given
    for key in ("instruction", "input", "output"):
        if key not in texts:
            raise ValueError(f"{key} is {'null or NaN' if key in record else 'missing'}")
        if not isinstance(texts[key], str):
            raise ValueError(f"{key} must be a text")
        texts[key].encode()  # raises a ValueError at half of a surrogate pair
    if not texts["instruction"].strip():
        raise ValueError("instruction is empty")
    return Record(texts["instruction"], texts["input"], texts["output"], str(texts.get("task") or ""))
