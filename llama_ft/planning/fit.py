"""Checks by fake runs if a run fits the GPU of this machine, and finds the most tokens or samples that fit a card."""

from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from llama_ft.config import ParallelConfig, Strategy, TrainConfig, UserError
from llama_ft.config.checks import Settings
from llama_ft.planning.allocator import reserved_bytes
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.gpu_traits import Traits, profile_here, traits_of, workspace_bytes
from llama_ft.planning.last_resort import last_resorts, typed
from llama_ft.planning.lengths import Lengths, blank_samples
from llama_ft.system import MIB

# Memory for CUDA's libraries and kernels. They are loaded on first use, after free memory has been read, when only the
# context is there. The profiles' largest context, of an H100, is 676 MiB; a new one has about 450.
LIBRARIES_MIB = 300
CARDS = (2, 4, 8, 16)  # the numbers of cards to try
MICRO_BATCH, PACKING, MAX_LENGTH = "training.micro_batch_size", "training.packing", "data.max_length"


def reserved_mib(config: TrainConfig, lengths: Lengths, traits: Traits, workspace: int) -> float:
    """The memory that a run would reserve on CUDA, with `workspace` bytes for cuBLAS, from a fake run."""
    return reserved_bytes(fake_run(config, blank_samples(lengths), traits).events, workspace) / MIB


@dataclass(frozen=True)
class Capacity:
    """The memory that a run may use."""

    mib: float
    context_mib: float  # the part in use before the first tensor
    about: str  # a clause that says where the limit comes from


def objection_here(config: TrainConfig, lengths: Lengths, held_out: Lengths = ()) -> str | None:
    """Explain why a run would not fit the GPU of this machine, and what would; None if it may fit.

    None also without a GPU, and for a run that cannot begin at all: it reports its own error.
    """
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    real = profile_here(config.gpu)
    played = replace(real, compute_capability=config.gpu.compute_capability or real.compute_capability)
    capacity = capacity_of(config, free / MIB, real.name)
    with suppress(UserError):
        return objection(config, lengths, capacity, traits_of(played), workspace_bytes(real), held_out)
    return None


def capacity_of(config: TrainConfig, free_mib: float, device: str) -> Capacity:
    """The memory that a run may use: all that is free on the device, or less if a profile or a limit says so."""
    gpu, limit = config.gpu, config.measure.memory_limit_mib
    capacity = Capacity(free_mib, LIBRARIES_MIB, f"this {device} has {free_mib:,.0f} free")
    if gpu.memory_mib is not None and gpu.memory_mib - gpu.context_mib <= free_mib - LIBRARIES_MIB:
        capacity = Capacity(gpu.memory_mib, gpu.context_mib, f"{gpu.name} has {gpu.memory_mib:,}")
    if limit is not None and limit < capacity.mib - capacity.context_mib:
        return Capacity(limit, 0, f"measure.memory_limit_mib allows {limit:,}")
    return capacity


def objection(
    config: TrainConfig, lengths: Lengths, capacity: Capacity, traits: Traits, workspace: int, held_out: Lengths = ()
) -> str | None:
    """Explain why a run would not fit, with `workspace` bytes for cuBLAS, and what would; None if it fits.

    A UserError if the run cannot begin at all.
    """
    run = fake_run(config, blank_samples(lengths), traits, blank_samples(held_out))
    need = reserved_bytes(run.events, workspace) / MIB + capacity.context_mib
    if (missing := need - capacity.mib) <= 0:
        return None
    larger = f"python -m llama_ft.plan model={config.model.name} goal=cheapest_gpu finds a card that is large enough"
    hint = larger
    smallest: tuple[TrainConfig, Settings] = config, {}
    for other, settings in alternatives(config, run.use.at_peak_mib["activation"] > missing):
        with suppress(UserError):
            mib = reserved_mib(other, lengths, traits, workspace) + capacity.context_mib
            would_need = f"{typed(other.optim, settings)} would need {mib:,.0f}"
            if mib <= capacity.mib:
                hint = would_need
                break
            hint, smallest = f"even {would_need}; {larger}", (other, settings)
    else:
        if n := fewest_cards(smallest[0], lengths, traits, workspace, capacity.mib - capacity.context_mib):
            hint += f"; on {n} such cards {typed(smallest[0].optim, smallest[1])} {on_cards(n)} would fit"
    return (
        f"{config.optim.combination} on {config.model.name} needs {need:,.0f} MiB at its peak, but {capacity.about}:"
        f" {hint}; plan.enforce=false runs it anyway"
    )


def alternatives(config: TrainConfig, activations_suffice: bool) -> list[tuple[TrainConfig, Settings]]:
    """Other runs to try, the smallest change first, and their settings besides techniques; 4-bit weights come last.

    GC is tried without other techniques if the activations are larger than the missing memory.
    """
    optim = config.optim
    first = replace(optim, gc=True) if activations_suffice else replace(optim, mp=True, lora=True)
    last = replace(optim, mp=True, lora=True, gc=True)
    found: list[tuple[TrainConfig, Settings]] = []
    for other in [first] if first == last else [first, last]:
        with suppress(UserError):  # incompatible with the run's other settings
            found += [(replace(config, optim=other), {})] if other != optim else []
    return found + [each for each in last_resorts(config) if each[0].optim == last]


def on_cards(n: int) -> str:
    """The settings that split a run over n cards, as typed."""
    return f"parallel=fsdp parallel.processes={n}"


def fewest_cards(config: TrainConfig, lengths: Lengths, traits: Traits, workspace: int, limit_mib: float) -> int | None:
    """The smallest number of cards, more than the run has, on which it fits when split by FSDP; None if none does."""
    for n in CARDS:
        if n > config.parallel.world_size:
            with suppress(UserError):  # the run's settings are incompatible with several processes
                split = replace(config, parallel=ParallelConfig(Strategy.fsdp, n))
                if reserved_mib(split, lengths, traits, workspace) <= limit_mib:
                    return n
    return None


def varied(key: str, config: TrainConfig, lengths: Lengths, number: int) -> tuple[TrainConfig, Lengths]:
    """The run with another micro-batch size, packing or longest sample.

    For the longest sample, enough samples of that length fill a window, with everything but BOS trained on: the worst
    case.
    """
    if key == MAX_LENGTH:
        n_samples = config.training.micro_batch_size * config.accumulation_steps
        return config, [(number, 1)] * min(len(lengths), n_samples)
    if key == PACKING:
        return replace(config, training=replace(config.training, packing=number)), lengths
    return replace(config, training=replace(config.training, micro_batch_size=number)), lengths


def largest(
    key: str,
    config: TrainConfig,
    lengths: Lengths,
    traits: Traits,
    workspace: int,
    limit_mib: float,
    numbers: range,
    step: int,
) -> int:
    """The largest of the numbers with which a run fits; one below the first if none does.

    The allocator reserves whole pages, so needs do not rise strictly with the number. The result fits, and the next
    larger number does not.

    Args:
        key: the setting to vary, as in `varied`.
        limit_mib: the most that may be reserved.
        step: the first step above the numbers' start. It doubles while runs fit, then the range is bisected.
    """

    def is_too_large(number: int) -> bool:
        return reserved_mib(*varied(key, config, lengths, number), traits, workspace) > limit_mib

    fits, end = numbers.start - 1, numbers.stop
    while fits + step < end and not is_too_large(fits + step):
        fits, step = fits + step, 2 * step
    return fits + bisect_left(range(fits + 1, min(end, fits + step)), True, key=is_too_large)
