"""Predicts the memory that runs need on cards, and their time at best."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product

from llama_ft.bitsandbytes import is_installed, needs_package
from llama_ft.config import TECHNIQUES, GpuConfig, TrainConfig, UserError
from llama_ft.measure.memory import EVALUATION, Event, bytes_alive
from llama_ft.model.four_bit import FourBit
from llama_ft.planning.allocator import reserved_bytes
from llama_ft.planning.fake_run import FakeRun, fake_run
from llama_ft.planning.gpu_traits import Traits, relevant_traits, traits_of, workspace_bytes
from llama_ft.planning.lengths import Lengths, blank_samples
from llama_ft.planning.operators import binding, bound_by_resource, bytes_of, flops_of, least_seconds, sent_of
from llama_ft.planning.processes import side_by_side
from llama_ft.planning.run_costs import RunCosts, run_costs
from llama_ft.records.plan import MemoryPoint, PlanRow
from llama_ft.records.result import MemoryItem
from llama_ft.system import MIB, Progress, no_progress

MAX_POINTS = 200  # of a timeline: few enough to draw
Key = tuple[str, Traits]


@dataclass(frozen=True)
class Needs:
    """A run's needs and costs, independent of the card's sizes."""

    run: FakeRun  # without its events
    reserved_mib: dict[int, float]  # by bytes of workspaces
    timeline: list[MemoryPoint]  # of the last optimizer step
    costs: RunCosts


def predict(
    configs: Sequence[TrainConfig],
    gpus: Sequence[GpuConfig],
    lengths: Lengths,
    progress: Progress = no_progress,
    held_out: Lengths = (),
) -> list[PlanRow]:
    """A row for each run of one model on the same data, on each card, ordered by card, then by run.

    A UserError if a run can begin nowhere, for example because a LoRA target does not exist.
    """
    runs = [(gpu, *run) for gpu, run in product(gpus, enumerate(configs))]
    groups: dict[Key, dict[int, TrainConfig]] = defaultdict(dict)  # runs that share fake steps, by their number
    for gpu, number, run in runs:
        if refusal(run, gpu) is None:
            groups[_key(run, gpu)][number] = run
    workspaces = sorted({workspace_bytes(gpu) for gpu in gpus})
    jobs = {key: (list(group.values()), lengths, held_out, key[-1], workspaces) for key, group in groups.items()}
    needs: dict[tuple[Key, int], Needs] = {}
    with progress("plan", sum(map(len, groups.values()))) as advance:
        for key, results in side_by_side(needs_of, jobs):
            needs |= {(key, number): each for number, each in zip(groups[key], results, strict=True)}
            advance(len(results))
    rows = [_row(run, gpu, needs.get((_key(run, gpu), number))) for gpu, number, run in runs]
    for row in rows[len(configs) :]:
        row.timeline = []  # only the first card's are drawn
    return rows


def _key(config: TrainConfig, gpu: GpuConfig) -> Key:
    """A key that is equal for runs that share fake steps, differing only in techniques that change no operators."""
    settings = config.to_dict()
    on = [each.name for each in TECHNIQUES if each.changes_operators and getattr(config.optim, each.name)]
    packed = config.accumulation_steps if config.training.packing else 0  # the samples of an update share passes
    parallel = [config.parallel.strategy.name, config.parallel.world_size]
    if config.parallel.is_split:  # a process's number of samples depends on the size of an update
        packed = config.accumulation_steps
    changing = [{name: settings.get(name) for name in on}, settings["training"], parallel, packed]
    return json.dumps(changing), relevant_traits(traits_of(gpu), config)


def refusal(config: TrainConfig, gpu: GpuConfig) -> str | None:
    """Explain why a run cannot run on the card, or be planned: the 16-bit format, the optimizer, a missing package."""
    try:
        frozen = traits_of(gpu).precision(config).storage(frozen=config.optim.lora)
    except UserError as error:
        return str(error)
    if is_installed():
        return None
    if isinstance(frozen, FourBit):
        return needs_package("mp.frozen_weights")
    return needs_package("training.optimizer") if "8bit" in config.training.optimizer.name else None


def needs_of(
    configs: Sequence[TrainConfig], lengths: Lengths, held_out: Lengths, traits: Traits, workspaces: Sequence[int]
) -> list[Needs]:
    """The needs of runs that differ only in techniques that do not change a micro-batch's operators."""
    samples, needs = blank_samples(lengths), []
    for config, costs in zip(configs, run_costs(configs, samples, traits), strict=True):
        run = fake_run(config, samples, traits, blank_samples(held_out))
        reserved = {size: (reserved_bytes(run.events, size) if traits.on_cuda else 0) / MIB for size in workspaces}
        needs.append(Needs(replace(run, events=[]), reserved, timeline(run.events, run.last_step), costs))
    return needs


def timeline(events: Sequence[Event], start: int) -> list[MemoryPoint]:
    """Memory by category during the step whose events begin at index `start`; the maximum of every few events.

    A fused optimizer with existing state allocates nothing: unless it runs within the backward pass, its point is the
    memory alive when it runs.
    """
    alive = bytes_alive(events)

    def point(index: int, phase: str) -> MemoryPoint:
        return MemoryPoint(index - begin, phase, {name: series[index] / MIB for name, series in alive.items()})

    begin = next(number for number in range(start, len(events)) if events[number][2] == "forward")
    end = next((n for n in range(begin, len(events)) if events[n][2] in ("after the step", EVALUATION)), len(events))
    width = max(1, -(-(end - begin) // MAX_POINTS))
    totals = [sum(now) for now in zip(*alive.values(), strict=True)]
    neighbors = groupby(range(begin, end), lambda index: ((index - begin) // width, events[index][2]))
    points = [point(max(few, key=totals.__getitem__), phase) for (_, phase), few in neighbors]
    if end == len(events) or events[end][2] == EVALUATION:
        return points
    return [*points, replace(point(end - 1, "optimizer step"), event=end - begin)]


def _row(config: TrainConfig, gpu: GpuConfig, needs: Needs | None) -> PlanRow:
    """A combination's row, from its needs and the card's overheads; `needs` is None if the card cannot run it."""
    row = PlanRow(asdict(config.optim), config.optim.combination, gpu.name)
    if needs is None:
        row.error = refusal(config, gpu)
        return row
    use, costs, workspace_mib = needs.run.use, needs.costs, workspace_bytes(gpu) / MIB

    def with_workspace(memory: dict[str, float]) -> dict[str, float]:
        return memory | {"other": memory["other"] + workspace_mib}

    row.trainable_params, row.total_params = needs.run.trainable_params, needs.run.total_params
    row.peak_memory_mib, row.peak_phase = use.peak_mib + workspace_mib, use.phase
    row.memory_mib, row.memory_max_mib = with_workspace(use.at_peak_mib), with_workspace(use.max_mib)
    row.breakdown = list(use.breakdown)
    row.managed_mib = needs.run.managed_bytes / MIB or None
    for point in needs.timeline:  # in tenths of a MiB, precise enough for drawing
        rounded = {category: round(mib, 1) for category, mib in with_workspace(point.memory_mib).items()}
        row.timeline.append(replace(point, memory_mib=rounded))
    row.context_mib, row.total_memory_mib = gpu.context_mib, gpu.memory_mib
    row.host_memory_mib = needs.run.host_bytes / MIB or None
    if workspace_mib:
        row.breakdown.append(MemoryItem("other", "-", workspace_mib, "cuBLAS workspaces"))
        row.reserved_mib = needs.reserved_mib[workspace_bytes(gpu)]
        row.required_mib = row.reserved_mib + gpu.context_mib
        if gpu.memory_mib is not None:
            row.margin_mib = gpu.memory_mib - row.required_mib
            row.fits = row.margin_mib >= 0
    row.steps, row.samples, row.tokens = costs.steps, costs.samples, costs.tokens
    row.flops, row.bytes_moved = flops_of(costs.operators), bytes_of(costs.operators)
    row.operators = sum(costs.operators.values())
    if config.parallel.is_split:
        row.parallel = {"strategy": config.parallel.strategy.name, "processes": config.parallel.world_size}
        row.sent_mib = sent_of(costs.operators) / costs.steps / MIB
    if bound_s := bound_by_resource(costs.operators, gpu):
        row.bound_s, row.binds = bound_s, binding(bound_s)
        row.runtime_s = row.bound_runtime_s = least_seconds(bound_s)
        row.tokens_per_s = costs.tokens / row.runtime_s
    return row
