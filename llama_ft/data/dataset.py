"""Instruction records from JSON or JSONL files, and the tokenized samples made of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

from llama_ft.config import DataConfig, OnBadRecord, TrainConfig, UserError
from llama_ft.data.download import fetch
from llama_ft.data.json_records import json_records
from llama_ft.data.records import KINDS, Record, Sample, as_record, kind_of
from llama_ft.data.template import Template, choose_template
from llama_ft.data.tokenizer import Tokenizer, load_tokenizer
from llama_ft.records.result import template_of_run
from llama_ft.system import Pace

Log = Callable[[str], None]
FIRST_KEYS = tuple(keys[0] for keys in KINDS.values())  # a file that is one object is a record if it has one of these
SAMPLE_DIR = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Dataset:
    """The samples of a run, and what became of the records they come from."""

    samples: list[Sample]
    n_skipped: int  # bad records left out, where `data.on_bad_record=skip`
    n_truncated: int  # samples cut to the longest length allowed
    n_dropped: int  # samples of which the cut left no answer to train on
    template: str = "alpaca"  # in which they are written down
    ends: str = ""  # where they begin and end, for people

    def describe(self) -> str:
        """One line for people."""
        lengths = [len(sample) for sample in self.samples]
        trained = sum(sample.n_targets for sample in self.samples)
        text = f"{len(lengths)} samples, {sum(lengths):,} tokens (median {median(lengths):g}, longest {max(lengths)})"
        text += f", {trained / sum(lengths):.0%} of them trained on, template {self.template}"
        notes = {"bad records skipped": self.n_skipped, "truncated": self.n_truncated, "dropped": self.n_dropped}
        return text + "".join(f"; {count} {what}" for what, count in notes.items() if count)


class NothingLeft(UserError):
    """Every sample was cut before its answer."""


def silent(line: str) -> None:
    """Say nothing."""


def load_data(config: TrainConfig, log: Log = silent) -> Dataset:
    """The run's samples; a UserError also if the tokenizer is not the model's."""
    tokenizer = load_tokenizer(config)
    template = choose_template(config.data.template, tokenizer, template_of_run(config.adapter or config.checkpoint))
    return load_dataset(config.data, tokenizer, config.max_length, config.training.max_samples, log, template)


def load_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    max_length: int,
    max_samples: int | None,
    log: Log = silent,
    template: Template | None = None,
) -> Dataset:
    """Tokenize the records of a run, downloaded where needed; a UserError if a record is bad, or no sample is left."""
    path = records_file(config, log)
    records, n_skipped = read_records(path, config.on_bad_record, config.first)
    encoded, wanted, pace = list[Sample](), records[:max_samples], Pace()
    template = template or choose_template(config.template, tokenizer)
    for number, record in enumerate(wanted):
        try:
            encoded.append(template.sample(record, tokenizer, config.train_on))
        except ValueError as error:
            raise UserError(f"{path}, record {number}: {error}") from error
        if pace.is_due():
            log(f"data: {len(encoded):,} of {len(wanted):,} records tokenized")
    samples = [sample.cut(max_length) for sample in encoded]
    n_truncated = sum(len(sample) > max_length for sample in encoded)
    kept = [sample for sample in samples if sample.n_targets > 0]
    if not kept:
        if samples:
            raise NothingLeft(f"{path}: max_length={max_length} leaves no answer to train on")
        raise UserError(f"{path}: there are no records")
    n_dropped = len(samples) - len(kept)
    return Dataset(kept, n_skipped, n_truncated, n_dropped, template.name, tokenizer.describe_ends())


def records_file(config: DataConfig, log: Log = silent) -> Path:
    """The file of a data set: the user's own if given, else the download if there is a URL, else the built-in."""
    if config.path:
        return Path(os.path.expanduser(config.path))
    if config.url:
        return fetch(config.url, config.git_blob_id, config.cache_dir, log)
    return SAMPLE_DIR / "train.jsonl"


def read_records(path: Path, on_bad_record: OnBadRecord, first: int | None = None) -> tuple[list[Record], int]:
    """The first records of a JSON or JSONL file, and how many bad ones were skipped; a UserError if they may not be."""
    records, n_skipped, first_reason, kind = list[Record](), 0, "", ""
    for where, value in islice(json_records(path, FIRST_KEYS), first):
        try:
            records.append(as_record(value, kind))
            kind = kind or kind_of(value)
        except ValueError as error:
            if on_bad_record is OnBadRecord.error:
                advice = "data.on_bad_record=skip leaves such records out"
                raise UserError(f"{path}, {where}: {error}. {advice}") from error
            n_skipped, first_reason = n_skipped + 1, first_reason or f"{where}: {error}"
    if n_skipped and not records:
        raise UserError(f"{path}: all {n_skipped} records are bad, the first is {first_reason}")
    return records, n_skipped
