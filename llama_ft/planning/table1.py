"""Table 1: each technique's effect on each kind of memory and on computation, from fake runs with and without it.

Memory is that of the plan's own rows, or of further fake runs if the plan has none. Computation is that of samples as
long as the data's longest, so that a technique is neither credited with nor charged for the padding of uneven samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_ft.bitsandbytes import is_installed
from llama_ft.config import TECHNIQUES, Dtype, GpuConfig, OptimConfig, Optimizer, TrainConfig, UserError
from llama_ft.config.checks import Offload, Policy
from llama_ft.data.collate import Padding
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.gpu_traits import Traits, traits_of
from llama_ft.planning.lengths import Lengths, blank_samples
from llama_ft.planning.operators import GIGA, RATES, TERA, bytes_of, flops_of
from llama_ft.planning.predict import refusal
from llama_ft.planning.processes import side_by_side
from llama_ft.planning.run_costs import run_costs
from llama_ft.records.plan import SAME, PlanRow, Table1, Table1Cell, Table1Row, arrow
from llama_ft.system import Progress, no_progress

MEMORY = ("parameter", "activation", "gradient", "optimizer_state")
LABELS = {each.name: each.label for each in TECHNIQUES} | {"optimizer": "Optimizer"}
# A technique, a description of the choice, and the runs without and with it.
Contrast = tuple[str, str, TrainConfig, TrainConfig]


@dataclass(frozen=True)
class Case:
    """A run's memory and computation."""

    memory: dict[str, float]  # MiB by category: each one's own maximum
    flops: dict[str, float]  # by dtype, for the samples of equal length
    bytes_moved: float
    steps: int  # optimizer steps for these samples


def table1(
    config: TrainConfig, gpu: GpuConfig, lengths: Lengths, rows: Sequence[PlanRow], progress: Progress = no_progress
) -> Table1:
    """The table for a card. A row that the card cannot run, such as bf16 on a card without it, becomes a note.

    Memory that the plan's `rows` have for this card is not computed again.
    """
    is_packed = config.training.packing is not None
    config = replace(config, training=replace(config.training, packing=None))  # packing has no micro-batch size
    longest = max(lengths, key=lambda pair: (pair[0], -pair[1]))
    equal = [longest] * (config.ga.steps * config.training.micro_batch_size)  # an effective batch of the longest
    all_contrasts, table_rows, notes = contrasts(config), [], _notes(config, traits_of(gpu), equal)
    notes += ["Without packing, unlike the plan above."] if is_packed else []
    runs = {_key(run): run for _, _, *pair in all_contrasts for run in pair}
    refusals = {key: reason for key, run in runs.items() if (reason := refusal(run, gpu))}
    known = {}
    # Otherwise the plan's rows are packed, or its micro-batches are smaller than the table's.
    if not is_packed and len(lengths) >= config.training.micro_batch_size:
        own = [row for row in rows if row.gpu == gpu.name]
        known = {_key(replace(config, optim=OptimConfig(**row.optim))): row.memory_max_mib for row in own}
    samples = list(lengths) * -(-len(equal) // len(lengths))  # enough for an effective batch at once
    possible = [key for key in runs if key not in refusals]
    possible.sort(key=lambda key: known.get(key) is not None)  # the slowest first
    jobs = {key: (runs[key], samples, equal, traits_of(gpu), known.get(key)) for key in possible}
    cases: dict[str, Case] = {}
    with progress("table 1", len(jobs)) as advance:
        for key, case in side_by_side(find_case, jobs):
            cases[key] = case
            advance(1)
    for technique, choice, without, using in all_contrasts:
        label, keys = LABELS[technique], (_key(without), _key(using))
        if reason := next((refusals[key] for key in keys if key in refusals), None):
            notes.append(f"{label}, {choice}: {reason}")
        else:
            table_rows.append(Table1Row(technique, label, choice, _cells(*(cases[key] for key in keys))))
    return Table1(_baseline(config, gpu, equal), table_rows, notes)


def contrasts(config: TrainConfig) -> list[Contrast]:
    """The rows; a technique has several in succession if its effect depends on a choice."""
    size, steps = config.training.micro_batch_size, config.ga.steps

    def run(micro_batch: int = size, frozen: Dtype = config.mp.frozen_weights, **on: bool) -> TrainConfig:
        training, mp = replace(config.training, micro_batch_size=micro_batch), replace(config.mp, frozen_weights=frozen)
        return replace(config, optim=OptimConfig(**on), training=training, mp=mp)

    held = f"effective batch of {steps * size} held: {steps} micro-batches of {size} instead of 1 of {steps * size}"
    longer = (
        f"micro-batch of {size} held: an update every {steps * size} samples instead of every {size}, as in Table 2"
    )
    kept = f"the input of every {'block' if config.gc.every == 1 else f'{config.gc.every} blocks'}"
    if config.gc.policy is Policy.selective:
        kept += " and the results of large matrix products"
    masters = "fp32 masters" if config.mp.trainable_weights is Dtype.fp32 else "16-bit weights"
    adapters = f"rank {config.lora.rank} on {', '.join(config.lora.targets)}, against full fine-tuning"
    frozen_16bit = "on LoRA, frozen weights in 16 bit (mp.frozen_weights=compute)"
    frozen_fp32 = "on LoRA, frozen weights in fp32 (mp.frozen_weights=fp32, the plain AMP)"
    on_lora = run(frozen=Dtype.compute, mp=True, lora=True)
    rows: list[Contrast] = [
        ("ga", held, run(steps * size), run(ga=True)),
        ("ga", longer, run(), run(ga=True)),
        ("gc", f"keeps only {kept}", run(), run(gc=True)),
        ("mp", f"full fine-tuning, {masters}", run(), run(mp=True)),
        ("mp", frozen_16bit, run(lora=True), on_lora),
        ("mp", frozen_fp32, run(lora=True), run(frozen=Dtype.fp32, mp=True, lora=True)),
        ("lora", adapters, run(), run(lora=True)),
    ]
    others = [each for each in TECHNIQUES if each.saves and each.name not in {row[0] for row in rows}]
    for each in others:
        rows.append((each.name, each.meaning, run(), replace(run(), optim=OptimConfig(**{each.name: True}))))
    return rows + further_savings(run(), run(gc=True), on_lora)


def further_savings(full: TrainConfig, checkpointed: TrainConfig, on_lora: TrainConfig) -> list[Contrast]:
    """Rows for settings that save more, each compared with the run to which it is added."""

    def update(run: TrainConfig, **changes: Any) -> TrainConfig:
        return replace(run, training=replace(run.training, **changes))

    eight_bit = {"optimizer": Optimizer.adamw_8bit}
    plain = {"optimizer": Optimizer.adamw, "optimizer_in_backward": False}
    full, checkpointed, on_lora = (update(run, **plain) for run in (full, checkpointed, on_lora))
    checkpointed = replace(checkpointed, gc=replace(checkpointed.gc, policy=Policy.full, offload=None))
    unclipped = update(full, optimizer_in_backward=True, max_grad_norm=math.inf)
    offloaded = replace(checkpointed, gc=replace(checkpointed.gc, offload=Offload.cpu))
    selective = replace(checkpointed, gc=replace(checkpointed.gc, policy=Policy.selective))
    rows = [
        ("gc", "on GC, inputs in the host's memory (gc.offload=cpu)", checkpointed, offloaded),
        ("gc", "also keeps large products (gc.policy=selective)", full, selective),
        ("optimizer", "each weight updated in backward, full fine-tuning", full, unclipped),
    ]
    if is_installed():
        nf4 = replace(on_lora, mp=replace(on_lora.mp, frozen_weights=Dtype.nf4))
        rows += [
            ("mp", "on LoRA with MP, frozen weights in 4 bits (mp.frozen_weights=nf4)", on_lora, nf4),
            ("optimizer", "8-bit moments, full fine-tuning", full, update(full, **eight_bit)),
            ("optimizer", "8-bit moments, on LoRA with MP", on_lora, update(on_lora, **eight_bit)),
        ]
    return sorted(rows, key=lambda row: list(LABELS).index(row[0]))


def _key(config: TrainConfig) -> str:
    """A key that is equal for equal runs within one table."""
    optim, mp, gc = config.optim, config.mp, config.gc
    return repr((optim, optim.mp and optim.lora and mp, optim.gc and gc, config.training))


def find_case(
    config: TrainConfig, lengths: Lengths, equal: Lengths, traits: Traits, memory: dict[str, float] | None
) -> Case:
    """A run's memory, unless known, at its data's hardest micro-batches, and its computation for equal samples."""
    once = replace(config, training=replace(config.training, epochs=1))
    costs = run_costs([once], blank_samples(equal), traits)[0]
    memory = memory or fake_run(config, blank_samples(lengths), traits).use.max_mib
    return Case(memory, flops_of(costs.operators), bytes_of(costs.operators), costs.steps)


def _cells(before: Case, after: Case) -> dict[str, Table1Cell]:
    """A row's cells; that of computation has a note on what FLOPs do not show."""

    def cell(was: float, is_now: float, unit: str, note: str = "") -> Table1Cell:
        return Table1Cell(arrow(was, is_now), was, is_now, unit, note)

    def facts(case: Case) -> dict[str, str]:
        formats = " and ".join(sorted(RATES.get(dtype, dtype) for dtype in case.flops))
        moved = f"{case.bytes_moved / GIGA:,.1f}"
        return {"matrix products in": formats, "optimizer steps": str(case.steps), "GB moved": moved}

    pairs = zip(facts(before).items(), facts(after).values(), strict=True)
    note = "; ".join(f"{name} {was} → {is_now}" for (name, was), is_now in pairs if was != is_now)
    tflop_before, tflop_after = (sum(case.flops.values()) / TERA for case in (before, after))
    memory = {name: cell(before.memory[name], after.memory[name], "MiB") for name in MEMORY}
    return memory | {"computation": cell(tflop_before, tflop_after, "TFLOP", note)}


def _baseline(config: TrainConfig, gpu: GpuConfig, equal: Lengths) -> str:
    size = config.training.micro_batch_size
    tokens, prompt = equal[0]
    return (
        f"{config.model.name} on {gpu.name}, all techniques off: full fine-tuning in fp32, micro-batches of {size}, an"
        " update after each; a row that starts from something else says so. Memory: each category's own maximum, at"
        f" the hardest micro-batches of the data (longest sample: {tokens} tokens). Computation: FLOPs of"
        f" {len(equal)} samples of {tokens} tokens, of which {tokens - prompt} are trained on."
    )


def _notes(config: TrainConfig, traits: Traits, equal: Lengths) -> list[str]:
    notes = [
        f"– is a change of at most {SAME:.0%}.",
        "The categories' maxima need not occur at the same instant, so they do not sum to the peak.",
        "FLOPs are those of matrix products and attention, 2 per multiply-add. The optimizer's update has none, but"
        " moves bytes, of which GA saves some by making updates rarer.",
        "GA: while gradients accumulate, a micro-batch's gradient of one weight at a time is in memory as well.",
        "MP: parameters include the 16-bit copies that autocast makes of fp32 weights and keeps until backward. Its"
        " matrix products run at the rate of the 16-bit format.",
        "GC: FLOPs include the recomputation in backward.",
    ]
    if not is_installed():
        notes.append("Without 4-bit weights and 8-bit moments, which need bitsandbytes: pip install 'llama_ft[quant]'.")
    width = equal[0][0] - 1
    try:
        multiple = traits.precision(replace(config, optim=OptimConfig(mp=True))).pad_multiple
    except UserError:
        return notes
    if (padded := Padding(multiple, config.model.max_seq_len).width(width)) != width:
        notes.append(f"MP on the CPU pads {width} positions to {padded}, which adds to activations and FLOPs.")
    return notes
