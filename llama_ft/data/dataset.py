"""Instruction records and the tokenized samples made from them."""

import json
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median

from llama_ft.config import DataConfig, OnBadRecord, TrainConfig, UserError, path_of
from llama_ft.config.checks import OnLong
from llama_ft.data.chat_template import ChatTemplate
from llama_ft.data.download import fetch
from llama_ft.data.record_files import records_in
from llama_ft.data.records import FIRST_KEYS, Record, Sample, Samples, as_record, kind_of
from llama_ft.data.template import CHAT, Template, choose_template
from llama_ft.data.tokenizer import Tokenizer, load_tokenizer
from llama_ft.data.validation import ReadSample, hold_out
from llama_ft.hub import is_hub_name
from llama_ft.system import Log, Pace, silent

SAMPLE_DIR = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Dataset:
    """The samples of a run, and how many records were skipped, cut or dropped."""

    samples: list[Sample]
    n_skipped: int  # bad records left out, with `data.on_bad_record=skip`
    n_truncated: int  # samples cut to the longest length allowed
    n_dropped: int  # samples left out: longer ones with `data.on_long=drop`, and those with no answer to train on
    template: str = "alpaca"
    template_file: str | None = None  # the content of the template's file, if it is the user's own
    ends: str = ""  # the tokens at which texts begin and end, for messages
    held_out: Samples = ()  # never trained on
    drawn: Collection[str] = ()  # places in the data of the held-out records that were drawn

    def describe(self) -> str:
        """One line for the log."""
        lengths = [len(sample) for sample in self.samples]
        trained = sum(sample.n_targets for sample in self.samples)
        text = f"{len(lengths)} samples, {sum(lengths):,} tokens (median {median(lengths):g}, longest {max(lengths)})"
        text += f", {trained / sum(lengths):.0%} of them trained on, template {self.template}"
        n_tokens = sum(map(len, self.held_out))
        held_out = f"{len(self.held_out)} samples, {n_tokens:,} tokens held out" if self.held_out else ""
        return "; ".join(filter(None, (text, _counts(self.n_skipped, self.n_truncated, self.n_dropped), held_out)))


def _counts(n_skipped: int, n_truncated: int, n_dropped: int) -> str:
    notes = {"bad records skipped": n_skipped, "truncated": n_truncated, "dropped": n_dropped}
    return "; ".join(f"{count} {what}" for what, count in notes.items() if count)


class NothingLeft(UserError):
    """Every sample is too long."""


def load_data(config: TrainConfig, log: Log = silent) -> Dataset:
    """Load the run's samples; a UserError also if the tokenizer is not the model's."""
    tokenizer = load_tokenizer(config, log)
    template = choose_template(config.data.template, tokenizer, config.adapter or config.checkpoint)
    most, seed = config.training.max_samples, config.training.seed
    return load_dataset(config.data, tokenizer, config.max_length, most, log, template, seed)


def load_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    max_length: int,
    max_samples: int | None,
    log: Log = silent,
    template: Template | None = None,
    seed: int = 0,
) -> Dataset:
    """Tokenize the records of a run, downloaded where needed, and hold out those that `data.validation` names.

    `max_samples` are read, including held-out ones drawn with the seed. A UserError if a record is bad, or if no sample
    is left to train on or to hold out.
    """
    template = template or choose_template(config.template, tokenizer)

    def read(source: DataConfig, most: int | None = None) -> tuple[Reader, list[ReadSample]]:
        reader = Reader(records_file(source, log), source, log)
        return reader, read_samples(reader, template, tokenizer, max_length, most, source.on_long)

    def read_held_out(source: DataConfig) -> list[ReadSample]:
        reader, samples = read(source)
        if noted := _counts(reader.n_skipped, reader.n_truncated, reader.n_dropped):
            log(f"data.validation: {noted}")
        return samples

    reader, samples = read(config, max_samples)
    samples, held_out = hold_out(samples, config, seed, read_held_out, log)
    counts = reader.n_skipped, reader.n_truncated, reader.n_dropped
    own = template.text if isinstance(template, ChatTemplate) and template.name != CHAT else None
    trained, kept_back = ([each.sample for each in part] for part in (samples, held_out))
    drawn = {each.where for each in held_out} if config.drawn_validation is not None else ()
    return Dataset(trained, *counts, template.name, own, tokenizer.describe_ends(), kept_back, drawn)


def read_samples(
    reader: "Reader", template: Template, tokenizer: Tokenizer, max_length: int, most: int | None, on_long: OnLong
) -> list[ReadSample]:
    """The samples of the first good records, with token ids in 4 bytes, not 36; a UserError if none is left."""
    samples = [
        ReadSample(where, record.identity, replace(sample, tokens=array("i", sample.tokens)))
        for where, record, sample in reader.samples(template, tokenizer, max_length, most)
    ]
    if not samples:
        none = "answer to train on" if on_long is OnLong.truncate else "sample: all of them are longer"
        raise NothingLeft(f"{reader.path}: max_length={max_length} leaves no {none}")
    return samples


def drawn_lines(config: DataConfig, drawn: Collection[str]) -> str:
    """The records that were drawn, read again, as lines of JSON."""
    records = (record for where, record in Reader(records_file(config), config).records() if where in drawn)
    return "".join(json.dumps(record.to_json(), ensure_ascii=False) + "\n" for record in records)


def records_file(config: DataConfig, log: Log = silent) -> Path:
    """The file of a data set: the user's own if given, else the download if there is a URL, else the built-in one."""
    if config.path:
        if is_hub_name(config.path):
            log(f"data: downloading {config.path}, unless datasets has it in its cache")
        return path_of(config.path)
    if config.url:
        return fetch(config.url, config.git_blob_id, config.cache_dir, log)
    return SAMPLE_DIR / "train.jsonl"


class Reader:
    """Reads records one at a time, makes samples of them, and counts those skipped, cut or dropped so far."""

    def __init__(self, path: Path, config: DataConfig, log: Log = silent) -> None:
        self.path, self._config, self._log = path, config, log
        self.n_records, self._first_bad = 0, ""  # counts good records
        self.n_skipped = self.n_truncated = self.n_dropped = 0

    def records(self) -> Iterator[tuple[str, Record]]:
        """(where, record) of the first good records; a UserError if a bad one may not be skipped, or none is good."""
        config, kind = self._config, None
        values = records_in(self.path, FIRST_KEYS, config.columns.given, config.subset, config.split)
        for where, value in islice(values, config.first):
            try:
                record = as_record(value)
                kind = kind or kind_of(value)
                if kind_of(value) != kind:
                    raise ValueError(f"it has {kind_of(value)}, earlier records have {kind}: use separate files")
            except ValueError as error:
                self._skip(where, error)
                continue
            self.n_records += 1
            yield where, record
        if not self.n_records:
            bad = f"all {self.n_skipped} records are bad, the first is {self._first_bad}"
            raise UserError(f"{self.path}: {bad if self.n_skipped else 'there are no records'}")

    def _skip(self, where: str, error: ValueError) -> None:
        if self._config.on_bad_record is OnBadRecord.error:
            advice = "data.on_bad_record=skip leaves such records out"
            raise UserError(f"{self.path}, {where}: {str(error).rstrip('.')}. {advice}") from error
        self.n_skipped += 1
        self._first_bad = self._first_bad or f"{where}: {error}"

    def whole_samples(self, template: Template, tokenizer: Tokenizer) -> Iterator[tuple[str, Record, Sample]]:
        """(where, record, sample) of each good record, however long it is."""
        pace = Pace()
        for where, record in self.records():
            try:
                sample = template.sample(record, tokenizer, self._config.train_on)
            except ValueError as error:  # a bad record too
                self.n_records -= 1
                self._skip(where, error)
                continue
            if pace.is_due():
                self._log(f"data: {self.n_records:,} records tokenized")
            yield where, record, sample

    def samples(
        self, template: Template, tokenizer: Tokenizer, max_length: int, most: int | None
    ) -> Iterator[tuple[str, Record, Sample]]:
        """(where, record, sample) of the first `most` good records, with `data.on_long` applied."""
        for where, record, whole in islice(self.whole_samples(template, tokenizer), most):
            if (sample := self.fitted(where, whole, max_length)) is not None:
                yield where, record, sample

    def fitted(self, where: str, sample: Sample, max_length: int) -> Sample | None:
        """The sample, cut if it is too long; None if dropped; a UserError if long samples are not allowed."""
        is_long = len(sample) > max_length
        if is_long and self._config.on_long is OnLong.error:
            limit = f"{len(sample):,} tokens are more than the {max_length:,} of data.max_length or the model's context"
            raise UserError(f"{self.path}, {where}: {limit}. data.on_long=truncate cuts such samples, drop drops them")
        cut = sample.cut(max_length) if is_long else sample
        if not cut.n_targets or (is_long and self._config.on_long is OnLong.drop):
            self.n_dropped += 1
            return None
        self.n_truncated += is_long
        return cut


def read_records(path: Path, on_bad_record: OnBadRecord, first: int | None = None) -> tuple[list[Record], int]:
    """The first records of a file, and the number of bad ones skipped; a UserError if they may not be."""
    reader = Reader(path, DataConfig(path.name, on_bad_record=on_bad_record, first=first))
    return [record for _, record in reader.records()], reader.n_skipped
