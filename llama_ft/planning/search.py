"""The largest number that still fits: of tokens in a sample, or of samples in a micro-batch.

Each number is tried in a fake run. Two such runs allocate the same storages in the same order, and between and beyond
them the size of each storage is on a line; replayed through the model of the allocator, these sizes say which number to
try next. What is found has been run itself, and so has the next larger number, which does not fit: the allocator takes
whole pages, so that needs do not quite rise with the number.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from llama_ft.config import TrainConfig, UserError
from llama_ft.measure.memory import Allocation
from llama_ft.planning.allocator import reserved_bytes
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.predict import Lengths, Runner, blank_samples
from llama_ft.system import MIB

MAX_ESTIMATES = 12  # tries after which the middle is taken, where estimates are of no use
EXPECTED_TRIES = 5


@dataclass(frozen=True)
class Tried:
    """What a fake run needs on CUDA, and the storages that it is made of."""

    reserved_mib: float
    sizes: list[int]  # bytes, in the order in which they come
    log: list[int]  # which of them comes, counted from 1, or goes, the same number below 0


Search = Generator[int, Tried, int]  # gives numbers to try, is sent what was found, and returns the largest that fits


def try_run(config: TrainConfig, lengths: Lengths, traits: Traits, workspace: int) -> Tried:
    """Run a combination on fake tensors, for its memory alone.

    Args:
        workspace: bytes of cuBLAS workspaces.

    Raises:
        UserError: if the combination cannot run on such a card.
    """
    events = fake_run(config, blank_samples(lengths), traits).events
    numbers: dict[int, int] = {}
    sizes: list[int] = []
    for storage, _, _ in events:
        if id(storage) not in numbers:
            sizes.append(storage.nbytes)
            numbers[id(storage)] = len(sizes)
    log: list[int] = []
    for coming, group in groupby(events, key=lambda event: event[1] > 0):
        order = [numbers[id(storage)] for storage, _, _ in group]
        # Several that go at once do so in any order, which changes nothing: free blocks become one.
        log += order if coming else [-number for number in sorted(order)]
    return Tried(reserved_bytes(events, workspace) / MIB, sizes, log)


def largest(limit_mib: float, lowest: int, highest: int, first: int, workspace: int) -> Search:
    """Look for the largest number from `lowest` to `highest` that fits; `lowest - 1` if none does.

    Args:
        limit_mib: what may be reserved at most.
        first: the number to try first.
    """
    fits, too_large = lowest - 1, highest + 1  # both are taken for granted, and never tried
    tried: dict[int, Tried] = {}
    number = first
    while too_large - fits > 1:
        number = min(max(number, fits + 1), too_large - 1)
        tried[number] = yield number
        if tried[number].reserved_mib <= limit_mib:
            fits = number
        else:
            too_large = number
        if len(tried) == 1:
            number = 2 * number if fits == number else number // 2
        else:
            number = _estimate(tried, limit_mib, fits, too_large, workspace)
    return fits


def _estimate(tried: dict[int, Tried], limit_mib: float, fits: int, too_large: int, workspace: int) -> int:
    """The largest number between the two that should fit; where there is no telling, twice what fits or the middle."""
    nearest = sorted(tried, key=lambda number: abs(tried[number].reserved_mib - limit_mib))[:2]
    low, high = (fits, too_large) if fits in tried and too_large in tried else sorted(nearest)
    if tried[low].log != tried[high].log or len(tried) > MAX_ESTIMATES:
        return (fits + too_large) // 2 if too_large in tried else 2 * fits
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if _replayed_mib(low, tried[low], high, tried[high], middle, workspace) <= limit_mib:
            fits = middle
        else:
            too_large = middle
    return fits


def _replayed_mib(low: int, at_low: Tried, high: int, at_high: Tried, number: int, workspace: int) -> float:
    """What would be reserved if each storage's size were on the line through its sizes in two runs."""
    share = (number - low) / (high - low)
    sizes = (max(1, round(a + (b - a) * share)) for a, b in zip(at_low.sizes, at_high.sizes, strict=True))
    storages = [Allocation(size, torch.uint8, "") for size in sizes]
    events = [(storages[abs(which) - 1], 1 if which > 0 else -1, "") for which in at_low.log]
    return reserved_bytes(events, workspace) / MIB


def side_by_side(
    searches: dict[str, Search],
    jobs: dict[str, Callable[[int], tuple[Any, ...]]],
    run: Runner,
    advance: Callable[[int], None],
) -> dict[str, int]:
    """What each search finds.

    Args:
        jobs: by search, the arguments of `try_run` for a number.
        advance: told of the tries; for each search it adds up to `EXPECTED_TRIES`.

    Raises:
        UserError: if a run cannot be tried.
    """
    found: dict[str, int] = {}
    asked: dict[str, int] = {}
    left = dict.fromkeys(searches, EXPECTED_TRIES)

    def go_on(name: str, step: Callable[[], int]) -> None:
        try:
            asked[name] = step()
            done = min(1, left[name] - 1)
        except StopIteration as end:
            found[name], done = end.value, left[name]
        left[name] -= done
        advance(done)

    for name, search in searches.items():
        go_on(name, search.__next__)
    while asked:
        round_, asked = asked, {}
        for name, outcome in run(try_run, {name: jobs[name](number) for name, number in round_.items()}):
            if isinstance(outcome, UserError):
                raise outcome
            go_on(name, lambda name=name, outcome=outcome: searches[name].send(outcome))  # type: ignore[misc]
    return found


def uniform(n_tokens: int, config: TrainConfig, lengths: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Samples of so many tokens, all trained on but BOS, enough of them for a window: the hardest of this length."""
    n_samples = config.training.micro_batch_size * (config.ga.steps if config.optim.ga else 1)
    return [(n_tokens, 1)] * min(len(lengths), n_samples)
