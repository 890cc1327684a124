"""`data.json`: what there is to know of records before they are trained on."""

from dataclasses import dataclass

from llama_ft.config.checks import Settings
from llama_ft.records import SCHEMA_VERSION


@dataclass(frozen=True)
class Lengths:
    """Of whole samples, in tokens."""

    shortest: int
    median: float
    mean: float
    p90: int  # which 90 % of the samples do not exceed
    p99: int
    longest: int


@dataclass(frozen=True)
class Bin:
    """A bar of the histogram."""

    first: int  # tokens
    last: int | None  # None is any more
    records: int


@dataclass(frozen=True)
class Places:
    """Records that have something in common."""

    records: int
    first: list[str]  # where the first of them are


@dataclass(frozen=True)
class Segment:
    """A part of a sample's text, special tokens by their names."""

    text: str
    is_trained_on: bool


@dataclass(frozen=True)
class Example:
    """A record as the model reads it, whole."""

    name: str
    where: str
    tokens: int
    segments: list[Segment]


@dataclass(frozen=True)
class DataReport:
    """What was found."""

    data: str
    file: str
    tokenizer: str
    template: str
    ends: list[str]  # tokens that end a text
    max_length: int
    records: int
    skipped: int  # bad ones
    lengths: Lengths
    histogram: list[Bin]
    too_long: Places
    truncated: int
    dropped: int
    tokens: int  # of the samples that are left, cut where they are
    trained_tokens: int
    duplicates: Places  # that say what an earlier one says; the first with that one before it
    empty_answers: Places
    examples: list[Example]
    settings: Settings
    command: str
    schema_version: int = SCHEMA_VERSION
