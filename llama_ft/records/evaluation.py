"""`evaluate.json`: the results of an evaluation."""

from dataclasses import dataclass
from typing import Literal

from llama_ft.config.checks import Settings
from llama_ft.records import SCHEMA_VERSION

Role = Literal["model", "base", "fine_tuned"]


@dataclass(frozen=True)
class Perplexity:
    """The mean negative log-likelihood of tokens, and its exponential."""

    perplexity: float
    nll: float  # in nats
    tokens: int


@dataclass(frozen=True)
class TextPerplexity(Perplexity):
    """Perplexity of a text, in windows."""

    bits_per_byte: float
    windows: int


@dataclass(frozen=True)
class Share:
    """Number and share of correct answers."""

    correct: int
    records: int
    accuracy: float


@dataclass(frozen=True)
class Accuracy(Share):
    """The share over all records, and over each task's."""

    tasks: dict[str, Share]  # empty if no record names one


@dataclass(frozen=True)
class ExactMatch(Accuracy):
    """A model's accuracy."""

    ended_by_length: int  # answers that were cut off by `max_new_tokens`


@dataclass(frozen=True)
class Majority(Accuracy):
    """The accuracy of always giving each task's most frequent answer."""

    of: str  # the records that the most frequent answers are taken from
    answers: dict[str, str]  # by task


@dataclass(frozen=True)
class EvaluatedModel:
    """One of the models; None for what was not requested."""

    role: Role
    checkpoint: str
    adapter: str | None
    responses: Perplexity
    text: TextPerplexity | None
    exact_match: ExactMatch | None
    runtime_s: float


@dataclass(frozen=True)
class EvaluatedRecords:
    """The records that were answered."""

    name: str
    file: str
    is_held_out: bool  # the built-in ones that training never sees
    records: int
    skipped: int  # bad ones
    truncated: int  # whose answer was cut at the maximum length
    dropped: int  # whose prompt left no room for an answer


@dataclass(frozen=True)
class EvaluatedText:
    """The text whose perplexity was measured."""

    file: str
    bytes: int
    tokens: int  # after BOS
    window: int
    stride: int


@dataclass(frozen=True)
class Evaluation:
    """An evaluation."""

    model: str
    data: EvaluatedRecords
    text: EvaluatedText | None
    max_new_tokens: int
    models: list[EvaluatedModel]
    majority: Majority | None
    settings: Settings
    device: str
    dtype: str
    versions: dict[str, str | None]
    command: str
    template: str | None = None  # that formatted the records
    ends: str | None = None  # where texts begin and end, for display
    schema_version: int = SCHEMA_VERSION
