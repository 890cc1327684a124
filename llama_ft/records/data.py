"""`data.json`: a report on records before they are trained on."""

from dataclasses import dataclass

from llama_ft.config.checks import Settings
from llama_ft.records import SCHEMA_VERSION


@dataclass(frozen=True)
class Places:
    """Records that have something in common, with the positions of the first of them."""

    records: int
    first: list[str]


@dataclass(frozen=True)
class Example:
    """A record as the model reads it, special tokens by their names."""

    name: str
    where: str
    tokens: int
    parts: list[tuple[str, bool]]  # of its text; True if trained on


@dataclass(frozen=True)
class DataReport:
    """The report on a data set."""

    data: str
    tokenizer: str
    template: str
    ends: list[str]  # tokens that end a text
    max_length: int
    records: int
    skipped: int  # bad ones
    lengths: dict[str, float]  # of whole samples, in tokens: shortest, median, mean, p90, p99, longest
    histogram: dict[str, int]  # records by lengths
    too_long: Places
    truncated: int
    dropped: int
    tokens: int  # of the remaining samples, after truncation
    trained_tokens: int
    duplicates: Places  # of an earlier record; `first` is a pair
    empty_answers: Places
    examples: list[Example]
    settings: Settings
    command: str
    schema_version: int = SCHEMA_VERSION
