"""Held-out records, used to evaluate a run and never trained on."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from llama_ft.config import DataConfig, UserError, path_of
from llama_ft.data.records import Sample
from llama_ft.system import Log

SPLIT = "split:"  # before the name of a split of data.path
N_NAMED = 3  # records that are in both parts


@dataclass(frozen=True)
class ReadSample:
    """A sample, its record's place, and the record's `identity`."""

    where: str
    identity: int
    sample: Sample


Samples = list[ReadSample]


def hold_out(
    samples: Samples, config: DataConfig, seed: int, read: Callable[[DataConfig], Samples], log: Log
) -> tuple[Samples, Samples]:
    """The samples to train on and those held out, as `data.validation` says; logs records that are in both.

    Args:
        samples: all samples of data.path.
        seed: for drawing a share or a number of them.
        read: returns the samples of another file or split.

    A UserError if none would be left to train on, or the file cannot be read.
    """
    given, drawn = config.validation, config.drawn_validation
    if given is None:
        return samples, []
    if drawn is not None:
        samples, held_out = draw(samples, drawn, seed)
    else:
        try:
            held_out = read(held_out_source(config, given))
        except UserError as error:
            raise UserError(f"data.validation={given}: {error}") from error
    trained = {each.identity: each.where for each in samples}
    if both := [(each.where, trained[each.identity]) for each in held_out if each.identity in trained]:
        named = ", ".join(f"{where} as {other}" for where, other in both[:N_NAMED]) + ", …" * (len(both) > N_NAMED)
        log(f"data.validation: {len(both)} of the {len(held_out)} held-out records are trained on too: {named}")
    return samples, held_out


def held_out_source(config: DataConfig, given: str) -> DataConfig:
    """The data that `data.validation` names: a split of data.path, or another file, folder or data set."""
    if given.startswith(SPLIT):
        return replace(config, split=given.removeprefix(SPLIT), first=None)
    is_file = path_of(given).is_file()
    return replace(config, path=given, subset=None if is_file else config.subset, split=None, first=None)


def draw(samples: Samples, amount: float, seed: int) -> tuple[Samples, Samples]:
    """Split off a random share (float) or number (int) of the samples; return the rest and the drawn, both in order."""
    n_drawn = amount if isinstance(amount, int) else max(1, round(amount * len(samples)))
    if n_drawn >= len(samples):
        raise UserError(f"data.validation={amount} leaves none of the {len(samples)} samples to train on")
    generator = random.Random(seed)  # only its random() promises the same numbers in all Python versions
    ranks = [generator.random() for _ in samples]
    drawn = set(sorted(range(len(samples)), key=ranks.__getitem__)[:n_drawn])
    parts: tuple[Samples, Samples] = [], []
    for number, sample in enumerate(samples):
        parts[number in drawn].append(sample)
    return parts
