"""The largest number that still fits: of tokens in a sample, or of samples in a micro-batch.

Each number is tried in a fake run. The allocator takes whole pages, so that needs do not quite rise with the number:
what is found fits, and the next larger number does not.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from llama_ft.config import TrainConfig
from llama_ft.planning.allocator import reserved_bytes
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.lengths import Lengths, blank_samples
from llama_ft.system import MIB


def reserved_mib(config: TrainConfig, lengths: Lengths, traits: Traits, workspace: int) -> float:
    """What a run would reserve on CUDA, with so many bytes of cuBLAS workspaces, from a fake run for its memory."""
    return reserved_bytes(fake_run(config, blank_samples(lengths), traits).events, workspace) / MIB


def with_tokens(config: TrainConfig, lengths: Lengths, n_tokens: int) -> tuple[TrainConfig, Lengths]:
    """Samples of so many tokens, all trained on but BOS, enough of them for a window: the hardest of this length."""
    n_samples = config.training.micro_batch_size * config.accumulation_steps
    return config, [(n_tokens, 1)] * min(len(lengths), n_samples)


def with_samples(config: TrainConfig, lengths: Lengths, n_samples: int) -> tuple[TrainConfig, Lengths]:
    """So many samples in a micro-batch."""
    return replace(config, training=replace(config.training, micro_batch_size=n_samples)), lengths


def largest(
    vary: Callable[[TrainConfig, Lengths, int], tuple[TrainConfig, Lengths]],
    config: TrainConfig,
    lengths: Lengths,
    traits: Traits,
    workspace: int,
    limit_mib: float,
    numbers: range,
    step: int,
) -> int:
    """The largest of the numbers with which a run fits; one below the first if none does.

    Args:
        vary: changes a run to one with such a number.
        limit_mib: what may be reserved at most.
        step: of the first try above the numbers' start; it doubles while runs fit. Then the range is bisected.
    """

    def is_too_large(number: int) -> bool:
        return reserved_mib(*vary(config, lengths, number), traits, workspace) > limit_mib

    fits, end = numbers.start - 1, numbers.stop
    while fits + step < end and not is_too_large(fits + step):
        fits, step = fits + step, 2 * step
    return fits + bisect_left(range(fits + 1, min(end, fits + step)), True, key=is_too_large)
