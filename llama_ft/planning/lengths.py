"""The lengths of the samples that a plan is made for."""

from collections.abc import Sequence
from statistics import median

from llama_ft.config import PlanConfig, UserError, found_tokenizer
from llama_ft.config.plan import STAND_IN_SAMPLES
from llama_ft.data.dataset import NothingLeft, load_dataset
from llama_ft.data.records import Sample, Samples
from llama_ft.data.tokenizer import load_tokenizer
from llama_ft.records.plan import PlannedData
from llama_ft.system import Log

Lengths = Sequence[tuple[int, int]]  # each sample's number of tokens, and how many of them are the prompt's


def data_lengths(config: PlanConfig, log: Log) -> tuple[Lengths, PlannedData, Lengths]:
    """The lengths of the run's samples, a description of the data, and the lengths of held-out samples.

    If the lengths cannot be known, samples of the longest allowed length stand in for them: without a tokenizer, if the
    checkpoint's tokenizer cannot be read, or if no sample has an answer left. A UserError if the data cannot be read,
    or a tokenizer given by the user.
    """
    name, reason, most = config.data.title, "no tokenizer is given", config.training.max_samples
    try:
        tokenizer = load_tokenizer(config) if config.has_lengths else None
    except UserError as error:
        if config.tokenizer != found_tokenizer(config.model, config.checkpoint):
            raise
        config.tokenizer, tokenizer, reason = None, None, str(error)  # the user did not choose it
    try:
        if tokenizer is not None:
            dataset = load_dataset(config.data, tokenizer, config.max_length, most, log, seed=config.training.seed)
            samples = dataset.samples
            counts = [len(sample) for sample in samples]
            tokens, longest = sum(counts), max(counts)
            spread = f"median {median(counts):g}, longest {longest}"
            written = f"template {dataset.template}; {dataset.ends}"
            about = f"{len(samples):,} samples of {name}, {tokens:,} tokens ({spread}), {written}"
            about += f"; {len(dataset.held_out)} held out" if dataset.held_out else ""
            data = PlannedData(name, about, False, len(samples), longest, tokens)
            return lengths_of(samples), data, lengths_of(dataset.held_out)
    except NothingLeft as error:  # train will report it too
        reason = str(error)
    n_samples, length = most or config.data.first or STAND_IN_SAMPLES, config.max_length
    about = (
        f"{reason}: {n_samples:,} samples of {length} tokens stand in for {name}"
        " (tokenizer=FILE uses the real lengths; data.max_length=N another length, and makes train cut longer samples)"
    )
    lengths = [(length, 1)] * n_samples  # all but BOS are trained on: the worst case
    return lengths, PlannedData(name, about, True, n_samples, length, n_samples * length), ()


def lengths_of(samples: Samples) -> Lengths:
    """The lengths of samples."""
    return [(len(sample), sample.n_prompt) for sample in samples]


def blank_samples(lengths: Lengths) -> list[Sample]:
    """Samples of these lengths, with arbitrary tokens."""
    return [Sample.after([0] * n_tokens, n_prompt) for n_tokens, n_prompt in lengths]
