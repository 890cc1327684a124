"""`data.json`: what there is to know of records before they are trained on."""

from dataclasses import dataclass

from llama_ft.config.checks import Settings
from llama_ft.records import SCHEMA_VERSION


@dataclass(frozen=True)
class Places:
    """Records that have something in common, and where the first of them are."""

    records: int
    first: list[str]


@dataclass(frozen=True)
class Example:
    """A record as the model reads it, special tokens by their names."""

    name: str
    where: str
    tokens: int
    parts: list[tuple[str, bool]]  # of its text, and whether they are trained on


@dataclass(frozen=True)
class DataReport:
    """What was found."""

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
    tokens: int  # of the samples that are left, cut where they are
    trained_tokens: int
    duplicates: Places  # that say what an earlier one says; first a pair
    empty_answers: Places
    examples: list[Example]
    settings: Settings
    command: str
    schema_version: int = SCHEMA_VERSION
