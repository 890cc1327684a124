"""Combinations of techniques on cards: what each would need, and how long it would take at best."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from llama_ft.config import TECHNIQUES, GpuConfig, OptimConfig, TrainConfig, UserError
from llama_ft.measure.memory import MemoryUse
from llama_ft.planning.allocator import reserved_bytes
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.gpu_traits import Traits, relevant_traits, traits_of, workspace_bytes
from llama_ft.planning.lengths import Lengths, blank_samples
from llama_ft.planning.operators import bytes_of, flops_of
from llama_ft.planning.processes import Progress, no_progress, side_by_side
from llama_ft.planning.roofline import bound_by_resource
from llama_ft.planning.run_costs import RunCosts, run_costs
from llama_ft.planning.timeline import timeline
from llama_ft.records.plan import MemoryPoint, PlanRow
from llama_ft.records.result import MemoryItem
from llama_ft.system import MIB

Key = tuple[tuple[bool, ...], Traits]


@dataclass(frozen=True)
class Needs:
    """What a run needs and computes, whatever the card's sizes."""

    use: MemoryUse
    reserved_mib: dict[int, float]  # by bytes of workspaces
    timeline: list[MemoryPoint]  # of the last optimizer step
    costs: RunCosts
    trainable_params: int
    total_params: int


def predict(
    config: TrainConfig,
    optims: Sequence[OptimConfig],
    gpus: Sequence[GpuConfig],
    lengths: Lengths,
    progress: Progress = no_progress,
) -> list[PlanRow]:
    """A row for each combination on each card, in this order: cards, then combinations.

    Args:
        config: all but technique and card; `lengths` are its data's.

    Raises:
        UserError: if a combination can run nowhere, as with a LoRA target that there is not.
    """
    runs = [(gpu, replace(config, optim=optim)) for gpu, optim in product(gpus, optims)]
    groups: dict[Key, dict[str, TrainConfig]] = defaultdict(dict)  # runs that share fake steps, by combination
    for gpu, run in runs:
        if refusal(run, gpu) is None:
            groups[_key(run, gpu)][run.optim.combination] = run
    workspaces = sorted({workspace_bytes(gpu) for gpu in gpus})
    jobs = {key: (list(group.values()), lengths, key[-1], workspaces) for key, group in groups.items()}
    needs: dict[tuple[Key, str], Needs] = {}
    with progress("plan", sum(map(len, groups.values()))) as advance:
        for key, results in side_by_side(needs_of, jobs):
            needs |= {(key, combination): each for combination, each in zip(groups[key], results, strict=True)}
            advance(len(results))
    rows = [_row(run, gpu, needs.get((_key(run, gpu), run.optim.combination))) for gpu, run in runs]
    for row in rows[len(optims) :]:
        row.timeline = []  # the first card's are drawn
    return rows


def _key(config: TrainConfig, gpu: GpuConfig) -> Key:
    """Equal for runs that share fake steps."""
    switches = tuple(getattr(config.optim, each.name) for each in TECHNIQUES if each.changes_operators)
    return switches, relevant_traits(traits_of(gpu), config)


def refusal(config: TrainConfig, gpu: GpuConfig) -> str | None:
    """Why a card cannot run this, if it has not the 16-bit format; another one may."""
    try:
        traits_of(gpu).precision(config)
    except UserError as error:
        return str(error)
    return None


def needs_of(
    configs: Sequence[TrainConfig], lengths: Lengths, traits: Traits, workspaces: Sequence[int]
) -> list[Needs]:
    """Run combinations on fake tensors; they differ only in techniques which do not change a micro-batch's operators.

    Args:
        workspaces: bytes of cuBLAS workspaces, for each of which reserved memory is found.

    Raises:
        UserError: if the combinations cannot run on such a card.
    """
    samples, needs = blank_samples(lengths), []
    for config, costs in zip(configs, run_costs(configs, samples, traits), strict=True):
        run = fake_run(config, samples, traits)
        reserved = {size: (reserved_bytes(run.events, size) if traits.on_cuda else 0) / MIB for size in workspaces}
        points = timeline(run.events, run.last_step)
        needs.append(Needs(run.use, reserved, points, costs, run.trainable_params, run.total_params))
    return needs


def _row(config: TrainConfig, gpu: GpuConfig, needs: Needs | None) -> PlanRow:
    """A combination's row, from what it needs; None where the card cannot run it."""
    row = PlanRow(asdict(config.optim), config.optim.combination, gpu.name)
    if needs is None:
        row.error = refusal(config, gpu)
        return row
    row.trainable_params, row.total_params = needs.trainable_params, needs.total_params
    _note_memory(row, gpu, needs)
    _note_time(row, gpu, needs.costs)
    return row


def _note_memory(row: PlanRow, gpu: GpuConfig, needs: Needs) -> None:
    """Memory, with what the card adds: workspaces and context."""
    use, workspace = needs.use, workspace_bytes(gpu)
    workspace_mib = workspace / MIB
    row.peak_memory_mib, row.peak_phase = use.peak_mib + workspace_mib, use.phase
    row.memory_mib = use.at_peak_mib | {"other": use.at_peak_mib["other"] + workspace_mib}
    row.memory_max_mib = use.max_mib | {"other": use.max_mib["other"] + workspace_mib}
    row.breakdown = list(use.breakdown)
    for point in needs.timeline:  # in tenths of a MiB: it is there to be drawn
        memory = point.memory_mib | {"other": point.memory_mib["other"] + workspace_mib}
        rounded = {category: round(mib, 1) for category, mib in memory.items()}
        row.timeline.append(replace(point, memory_mib=rounded))
    row.context_mib, row.total_memory_mib = gpu.context_mib, gpu.memory_mib
    if workspace:
        row.breakdown.append(MemoryItem("other", "-", workspace_mib, "cuBLAS workspaces"))
        row.reserved_mib = needs.reserved_mib[workspace]
        row.required_mib = row.reserved_mib + gpu.context_mib
        if gpu.memory_mib is not None:
            row.margin_mib = gpu.memory_mib - row.required_mib
            row.fits = row.margin_mib >= 0


def _note_time(row: PlanRow, gpu: GpuConfig, costs: RunCosts) -> None:
    """What the run computes, and its time at the full rate of the card."""
    row.steps, row.samples, row.tokens = costs.steps, costs.samples, costs.tokens
    row.flops, row.bytes_moved = flops_of(costs.operators), bytes_of(costs.operators)
    row.operators = sum(costs.operators.values())
    row.bound_s = bound_by_resource(costs.operators, gpu)
    if row.bound_s:
        row.runtime_s = row.bound_runtime_s = sum(row.bound_s.values())
        row.tokens_per_s = costs.tokens / row.runtime_s
        row.binds = max(row.bound_s, key=row.bound_s.__getitem__)
