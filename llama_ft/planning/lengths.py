"""How long the samples are that a plan is made for."""

from collections.abc import Callable, Sequence
from statistics import median

from llama_ft.config import PlanConfig, UserError, found_tokenizer
from llama_ft.config.plan import STAND_IN_SAMPLES
from llama_ft.data.dataset import Sample, load_dataset
from llama_ft.data.tokenizer import load_tokenizer
from llama_ft.records.plan import PlannedData

Lengths = Sequence[tuple[int, int]]  # of each sample its tokens, and those of them that are the prompt's


def data_lengths(config: PlanConfig, log: Callable[[str], None]) -> tuple[Lengths, PlannedData]:
    """The lengths of the run's samples; without a tokenizer, samples of the longest length that is allowed.

    Raises:
        UserError: if the data cannot be read, or the tokenizer that is given.
    """
    name, reason = config.data.title, "no tokenizer is given"
    try:
        tokenizer = load_tokenizer(config) if config.has_lengths else None
    except UserError as error:
        if config.tokenizer != found_tokenizer(config.model, config.checkpoint):
            raise
        config.tokenizer, tokenizer, reason = None, None, str(error)  # nobody asked for it
    if tokenizer is not None:
        samples = load_dataset(config.data, tokenizer, config.max_length, config.training.max_samples, log).samples
        lengths = [(len(sample), sample.n_prompt) for sample in samples]
        middle, tokens = median(n for n, _ in lengths), sum(n for n, _ in lengths)
        longest = max(n for n, _ in lengths)
        about = f"{len(lengths):,} samples of {name}, {tokens:,} tokens (median {middle:g}, longest {longest})"
        return lengths, PlannedData(name, about, False, len(lengths), longest, tokens)
    n_samples, length = config.training.max_samples or config.data.first or STAND_IN_SAMPLES, config.max_length
    about = (
        f"{reason}: {n_samples:,} samples of {length} tokens stand in for {name}"
        " (tokenizer=FILE takes the real lengths; data.max_length=N another one, and makes train cut longer samples)"
    )
    lengths = [(length, 1)] * n_samples  # all but BOS are trained on: the most that can be
    return lengths, PlannedData(name, about, True, n_samples, length, n_samples * length)


def blank_samples(lengths: Lengths) -> list[Sample]:
    """Samples of these lengths, of any tokens."""
    return [Sample([0] * n_tokens, n_prompt) for n_tokens, n_prompt in lengths]
