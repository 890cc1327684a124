"""Combinations of techniques on cards: what each would need, and how long it would take at best."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import active_children, get_context
from typing import Any

from llama_ft.config import GpuConfig, OptimConfig, TrainConfig, UserError
from llama_ft.data.dataset import Sample
from llama_ft.measure.memory import MemoryUse
from llama_ft.planning.allocator import reserved_bytes
from llama_ft.planning.fake_run import FakeRun, fake_run
from llama_ft.planning.gpu_traits import Traits, relevant_traits, traits_of, workspace_bytes
from llama_ft.planning.roofline import Bound, bound
from llama_ft.planning.run_costs import RunCosts, run_costs
from llama_ft.planning.timeline import Point, timeline
from llama_ft.system import MIB

MAX_PROCESSES = 8
Lengths = Sequence[tuple[int, int]]  # of each sample its tokens, and those of them that are the prompt's


Start = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def unseen(total: int) -> Iterator[Callable[[int], None]]:
    """No progress to be seen."""
    yield lambda n: None


@dataclass(frozen=True)
class DryRun:
    """What a combination needs, whatever the card's sizes."""

    use: MemoryUse
    reserved_mib: dict[int, float]  # by bytes of workspaces
    timeline: list[Point]  # of the last optimizer step
    costs: RunCosts | None  # None where no time is asked for
    trainable_params: int
    total_params: int


def dry_run(
    configs: Sequence[TrainConfig], lengths: Lengths, traits: Traits, workspaces: Sequence[int], with_costs: bool = True
) -> list[DryRun]:
    """Run combinations on fake tensors, which differ in gradient accumulation alone.

    Args:
        workspaces: bytes of cuBLAS workspaces, for each of which reserved memory is found.

    Raises:
        UserError: if the combinations cannot run on such a card.
    """
    samples = blank_samples(lengths)
    costs = run_costs(configs, samples, traits) if with_costs else [None] * len(configs)
    return [
        _dry_run(fake_run(config, samples, traits), cost, workspaces, traits)
        for config, cost in zip(configs, costs, strict=True)
    ]


def _dry_run(run: FakeRun, costs: RunCosts | None, workspaces: Sequence[int], traits: Traits) -> DryRun:
    reserved = {size: (reserved_bytes(run.events, size) if traits.on_cuda else 0) / MIB for size in workspaces}
    points = timeline(run.events, run.last_step)
    return DryRun(run.use, reserved, points, costs, run.trainable_params, run.total_params)


def blank_samples(lengths: Lengths) -> list[Sample]:
    """Samples of these lengths, of any tokens."""
    return [Sample([0] * n_tokens, n_prompt) for n_tokens, n_prompt in lengths]


def combinations(with_gc: bool) -> list[OptimConfig]:
    """The course's eight, in its table's order; with gradient checkpointing too, sixteen."""
    gcs = (False, True) if with_gc else (False,)
    return [OptimConfig(ga, mp, lora, gc) for gc, ga, mp, lora in product(gcs, *[(False, True)] * 3)]


def predict(
    config: TrainConfig,
    optims: Sequence[OptimConfig],
    gpus: Sequence[GpuConfig],
    lengths: Lengths,
    start: Start = unseen,
) -> list[dict[str, Any]]:
    """A row for each combination on each card, in this order: cards, then combinations.

    Args:
        config: all but technique and card; `lengths` are its data's.
        start: called with the number of combinations to run, for something to be told as they are done.

    Raises:
        UserError: if a combination can run nowhere, as with a LoRA target that there is not.
    """
    configs = [replace(config, optim=optim) for optim in optims]
    sizes = sorted({workspace_bytes(gpu) for gpu in gpus})
    alike: dict[Key, dict[str, TrainConfig]] = {}
    found: dict[tuple[Key, str], DryRun | UserError] = {}
    for gpu, each in product(gpus, configs):
        key = _key(each, gpu)
        try:
            key[-1].precision(each)
            alike.setdefault(key, {})[each.optim.combination] = each
        except UserError as error:  # on this card; another one's row may do
            found[key, each.optim.combination] = error
    with start(sum(map(len, alike.values()))) as advance, processes(len(alike)) as run:
        jobs = {key: (list(group.values()), lengths, key[-1], sizes) for key, group in alike.items()}
        for key, outcome in run(dry_run, jobs):
            if isinstance(outcome, UserError):
                raise outcome
            found |= {(key, name): each for name, each in zip(alike[key], outcome, strict=True)}
            advance(len(alike[key]))
    rows = [row(each, gpu, found[_key(each, gpu), each.optim.combination]) for gpu in gpus for each in configs]
    for other in rows[len(configs) :]:
        other["timeline"] = []  # the first card's are drawn
    return rows


Key = tuple[bool, bool, bool, Traits]


def _key(config: TrainConfig, gpu: GpuConfig) -> Key:
    """Equal for runs that share fake steps."""
    optim = config.optim
    return optim.mp, optim.lora, optim.gc, relevant_traits(traits_of(gpu), config)


Runner = Callable[[Callable[..., Any], dict[Any, tuple[Any, ...]]], Iterator[tuple[Any, Any]]]


@contextmanager
def processes(n_jobs: int) -> Iterator[Runner]:
    """Something that runs jobs side by side, one to a core, and gives each one's outcome, or its UserError."""
    n_processes = min(n_jobs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, MAX_PROCESSES)
    if n_processes < 2:
        yield _one_after_the_other
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(["llama_ft.planning.worker"])
    pool = ProcessPoolExecutor(n_processes, context, _begin)

    def side_by_side(function: Callable[..., Any], jobs: dict[Any, tuple[Any, ...]]) -> Iterator[tuple[Any, Any]]:
        futures = {pool.submit(_outcome, function, arguments): key for key, arguments in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield side_by_side
    except BaseException:
        for process in active_children():  # nobody waits for what they would find
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _one_after_the_other(function: Callable[..., Any], jobs: dict[Any, tuple[Any, ...]]) -> Iterator[tuple[Any, Any]]:
    for key, arguments in jobs.items():
        yield key, _outcome(function, arguments)


def _begin() -> None:
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then ends us
    torch.set_num_threads(1)


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except UserError as error:
        return error


def row(config: TrainConfig, gpu: GpuConfig, found: DryRun | UserError) -> dict[str, Any]:
    """A row of `plan.json`."""
    known: dict[str, Any] = {"optim": asdict(config.optim), "combination": config.optim.combination, "gpu": gpu.name}
    if isinstance(found, UserError):
        return dict.fromkeys(KEYS) | known | {"error": str(found)}
    workspace = workspace_bytes(gpu)
    reserved = found.reserved_mib[workspace] if workspace else None
    peak = found.use.peak_mib + workspace / MIB
    required = None if reserved is None else reserved + gpu.context_mib
    memory, most = dict(found.use.at_peak_mib), dict(found.use.max_mib)
    memory["other"] += workspace / MIB
    most["other"] += workspace / MIB
    item = {"category": "other", "dtype": "-", "mb": workspace / MIB, "item": "cuBLAS workspaces"}
    fits = None if required is None or gpu.memory_mib is None else required <= gpu.memory_mib
    return (
        dict.fromkeys(KEYS)
        | known
        | {
            "peak_memory_mib": peak,
            "phase": found.use.phase,
            "memory_mib": memory,
            "memory_max_mib": most,
            "breakdown": [*found.use.breakdown, *([item] if workspace else [])],
            "reserved_mib": reserved,
            "context_mib": gpu.context_mib,
            "required_mib": required,
            "total_memory_mib": gpu.memory_mib,
            "fits": fits,
            "margin_mib": None if fits is None else gpu.memory_mib - required,  # type: ignore[operator]
            "trainable_params": found.trainable_params,
            "total_params": found.total_params,
            "timeline": _points(found.timeline, workspace),
            **(_times(bound(found.costs, gpu)) if found.costs else {}),
        }
    )


def _points(points: list[Point], workspace: int) -> list[dict[str, Any]]:
    """A timeline, in tenths of a MiB: it is there to be drawn."""
    drawn = []
    for point in points:
        memory = point.memory_mib | {"other": point.memory_mib["other"] + workspace / MIB}
        rounded = {name: round(mib, 1) for name, mib in memory.items()}
        drawn.append({"event": point.event, "phase": point.phase, "memory_mib": rounded})
    return drawn


def _times(found: Bound) -> dict[str, Any]:
    return {
        "steps": found.steps,
        "samples": found.samples,
        "tokens": found.tokens,
        "flops": found.flops,
        "bytes_moved": found.bytes_moved,
        "mapped_bytes": found.mapped_bytes,
        "operators": found.n_operators,
        "runtime_s": found.seconds,
        "tokens_per_s": found.tokens / found.seconds if found.seconds else None,
        "binds": found.binds,
        "bound_s": found.by_resource,
    }


KEYS = (
    "optim combination gpu error peak_memory_mib instant memory_mib memory_max_mib ledger reserved_mib context_mib"
    " required_mib total_memory_mib fits margin_mib trainable_params total_params steps samples tokens flops"
    " bytes_moved mapped_bytes operators runtime_s tokens_per_s binds bound_s timeline"
).split()
