"""How long the samples are that a plan is made for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from llama_ft.config import PlanConfig
from llama_ft.config.plan import STAND_IN_SAMPLES
from llama_ft.data.dataset import Sample, load_data
from llama_ft.records.plan import PlannedData

Lengths = Sequence[tuple[int, int]]  # of each sample its tokens, and those of them that are the prompt's


@dataclass(frozen=True)
class DataLengths:
    """Lengths of samples, and where they come from."""

    pairs: Lengths
    is_stand_in: bool  # whether they are made up, of the longest length allowed
    about: str  # a line for people

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(length for length, _ in self.pairs)

    def record(self, name: str) -> PlannedData:
        """What a plan says of this data."""
        tokens = sum(length for length, _ in self.pairs)
        return PlannedData(name, self.about, self.is_stand_in, len(self.pairs), self.longest, tokens)


def data_lengths(config: PlanConfig, log: Callable[[str], None]) -> DataLengths:
    """The lengths of the run's samples; without a tokenizer, samples of the longest length that is allowed.

    Args:
        log: called with lines for people about a download.

    Raises:
        UserError: if the data or the tokenizer cannot be read.
    """
    if config.has_lengths:
        pairs = lengths_of(load_data(config, log).samples)
        lengths = [length for length, _ in pairs]
        about = f"{len(pairs):,} samples of {config.data.name}, {sum(lengths):,} tokens (median {median(lengths):g},"
        return DataLengths(pairs, False, f"{about} longest {max(lengths)})")
    n_samples = config.training.max_samples or config.data.first or STAND_IN_SAMPLES
    length = config.max_length
    about = (
        f"no tokenizer is given: {n_samples:,} samples of {length} tokens stand in for {config.data.name}"
        " (tokenizer=FILE takes the real lengths; data.max_length=N another one, and makes train cut longer samples)"
    )
    return DataLengths([(length, 1)] * n_samples, True, about)  # all but BOS are trained on: the most that can be


def lengths_of(samples: Sequence[Sample]) -> Lengths:
    """The lengths of samples."""
    return [(len(sample), sample.n_prompt) for sample in samples]


def blank_samples(lengths: Lengths) -> list[Sample]:
    """Samples of these lengths, of any tokens."""
    return [Sample([0] * n_tokens, n_prompt) for n_tokens, n_prompt in lengths]
