"""The course's Table 2: a column for each combination; peak memory and runtime, absolute and relative to baseline."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from llama_ft.config.checks import Settings
from llama_ft.config.techniques import TECHNIQUES, shown_techniques
from llama_ft.records.plan import PlanRow
from llama_ft.records.result import Result
from llama_ft.reporting.best import held_out_counts, members
from llama_ft.reporting.repeats import runs_of, spread_of
from llama_ft.reporting.results import Group, Record, baseline_of, value_of
from llama_ft.reporting.table import MARKS, PLUS_MINUS, UNKNOWN, Rows, Table, amount, by_reason, technique_rows

REPEATS_NOTE = (
    "Means over the seeds, ± half the width of their 95 % confidence interval (Student's t), in pictures a bar with the"
    " runs as dots; without ±, the runs are equal to the digits shown, or there is only one."
)
RUNS = "Runs"  # shown if rows have different numbers of repeats, or not all finished
FAILED = ("killed", "interrupted", "error")  # with no result to report


class Measure(NamedTuple):
    """A row of a table: its title, and the field that its cells show."""

    title: str
    key: str
    form: Callable[[Any], str] = amount
    always: bool = False  # even if no record has a value
    relative: bool = False  # followed by the same numbers relative to the baseline


MEASURES = (
    Measure("Peak memory, MiB", "peak_memory_mib", always=True, relative=True),
    Measure("Reserved, MiB", "peak_memory_reserved_mib"),
    Measure("Peak RSS, MiB", "peak_rss_mib"),
    Measure("Runtime, s", "runtime_s", always=True, relative=True),
    Measure("Tokens/s", "tokens_per_s"),
    Measure("Joules/token", "joules_per_token", "{:.3g}".format),
    Measure("Loss before", "train_loss_before", "{:.3f}".format),
    Measure("Loss after", "train_loss_after", "{:.3f}".format),
    Measure("Held-out loss", "eval_loss", "{:.3f}".format),
    Measure("Token accuracy", "eval_token_accuracy", "{:.1%}".format),
)


def table2(group: Group) -> Table:
    """The measured table of a group."""
    head = technique_rows(result.optim for result in group.results)
    counts = run_counts(group.results)
    rows = measure_rows(group.results, MEASURES) + ([(RUNS, counts)] if counts else [])
    return Table(group.title, head, rows, _notes(group))


def measure_rows(records: Sequence[Record], measures: Iterable[Measure]) -> Rows:
    """A row for each measure that a record has a value of, and a cell for each record."""
    rows: Rows = []
    for title, key, form, always, relative in measures:
        is_known = any(getattr(record, key) is not None for record in records)
        if is_known or always:
            rows.append((title, [cell(record, key, form) for record in records]))
        if is_known and relative:
            base = getattr(baseline_of(records), key, None)
            rows.append(("  of baseline", [_share(record, key, base) for record in records]))
    return rows


def _share(record: Result | PlanRow, key: str, base: float | None) -> str:
    return cell(record, key, lambda value: f"{value / base:.0%}", with_spread=False) if base else UNKNOWN


def cell(record: Result | PlanRow, key: str, form: Callable[[Any], str] = amount, with_spread: bool = True) -> str:
    """A value, a dash if there is none, or the mark of a failed run; value and mark of one that would not fit.

    A mean of repeats is followed by its spread, unless that rounds to zero.
    """
    value, spread = value_of(record, key), spread_of(record, key) if with_spread else None
    if record.status == "ok":
        return UNKNOWN if value is None else form(value) + _spread(form(value), spread, form)
    mark = MARKS[record.status]
    return mark if value is None else f"{form(value)} {mark}"


def _spread(mean: str, spread: float | None, form: Callable[[Any], str]) -> str:
    """A spread with as many decimals as its mean, which is given as it is shown."""
    if spread is None:
        return ""
    decimals = len(mean.rstrip("%").partition(".")[2])
    text = form(spread) if "e" in mean else f"{spread:,.{decimals}{'%' if mean.endswith('%') else 'f'}}"
    return f"{PLUS_MINUS}{text}" if text.strip("0.,%") else ""


def run_counts(results: Sequence[Result]) -> list[str]:
    """The number of runs by their ending in each row of repeats, as `2, 1 ×`; empty if all rows are alike."""
    statuses = [[run.result.status for run in runs_of(result)] for result in results]
    if len({len(row) for row in statuses}) == 1 and all(len(set(row)) == 1 for row in statuses):
        return []
    counts = [Counter(sorted(row, key=lambda status: status != "ok")) for row in statuses]
    return [", ".join(f"{n} {MARKS.get(status, '')}".strip() for status, n in row.items()) for row in counts]


def technique_notes(
    optims: Sequence[dict[str, bool]], settings: dict[str, Settings], batch: int, packing: int | None
) -> list[str]:
    """Notes on the techniques in a table, and on those off in all columns; `batch` is a micro-batch's samples."""
    notes = []
    if any(optim.get("ga") for optim in optims):
        steps, of = settings["ga"]["steps"], f"micro-batches of {batch}, " if packing is None else ""
        notes.append(f"GA: {of}an update every {steps * batch} samples instead of every {batch}.")
    if packing is not None:
        notes.append(f"The samples of an update are put end to end, up to {packing:,} tokens (training.packing).")
    if any(optim.get("mp") and optim.get("lora") for optim in optims):
        if settings["mp"]["frozen_weights"] == "compute":
            notes.append("MP with LoRA: frozen weights are stored in 16 bit; mp.frozen_weights=fp32 is plain AMP.")
        else:
            notes.append("MP with LoRA: frozen weights are stored in fp32 (plain AMP).")
    if any(optim.get("gc") for optim in optims):
        if settings["gc"].get("policy", "full") == "selective":
            notes.append("GC: the results of large matrix products are kept too (gc.policy=selective).")
        if settings["gc"].get("offload"):
            notes.append("GC: inputs of blocks are kept in host memory (gc.offload=cpu) if there is a GPU.")
    shown = shown_techniques(optims)
    return notes + [f"{each.label} is off." for each in TECHNIQUES if each.saves and each not in shown]


def _notes(group: Group) -> list[str]:
    results, runs = group.results, [(run.result, run.named(run.result.combination)) for _, run in group.runs]
    began = next((r for r in results if r.config_hash), results[0])  # a refused run's values may be any
    notes = technique_notes([r.optim for r in results], began.techniques, began.micro_batch_size, began.packing)
    if began.compiled:
        notes.append("Layers are compiled (training.compile); tensors are counted before compilation.")
    if dtypes := sorted({r.compute_dtype for r in results if r.optim.get("mp") and r.compute_dtype}):
        notes.append(f"MP computes in {' and '.join(dtypes)}.")
    if skipped := [f"{name} {r.skipped_steps}" for r, name in runs if r.skipped_steps]:
        notes.append(f"Optimizer steps skipped while the loss scale was too large: {', '.join(skipped)}.")
    if retried := [f"{name} {r.card.n_alloc_retries}" for r, name in runs if r.card and r.card.n_alloc_retries]:
        notes.append(f"Times the allocator emptied its cache to find room, which is slow: {', '.join(retried)}.")
    return notes + measure_notes(group) + failures(group, [r.combination for r in results])


def memory_notes(group: Group) -> list[str]:
    """Notes on the meaning of a table's memory and times."""
    results, notes = group.results, []
    if group.seeds:
        notes.append(REPEATS_NOTE)
    if group.on_cuda:
        notes.append("Peak memory: the CUDA allocator's max allocated.")
    else:
        notes.append("Peak memory: bytes of tensors, counted in a separate pass; RSS: the whole process.")
    for name in sorted({str((r.parallel or {}).get("strategy")) for r in results if len(r.ranks) > 1}):
        notes.append(f"parallel={name}: memory is that of the process with the most; times are of all.")
    limit, gpu = group.memory_limit_mib, results[0].gpu
    if gpu not in ("auto", "cpu") and limit is not None and group.device:
        times = "times are those of the device named above"
        notes.append(f"gpu={gpu}: the allocator has that card's {limit:,} MiB; {times}.")
    if any(run.result.status == "oom" for _, run in group.runs):
        on_cpu = any(r.status == "ok" and not r.peak_memory_reserved_mib for r in results)
        holder = " on the process's data" if on_cpu else ""  # tensors are a part of it
        notes.append("×: out of memory" + (f" (limit {limit:,} MiB{holder})." if limit else "."))
    return notes


def measure_notes(group: Group) -> list[str]:
    """Notes on the meaning of a table's numbers."""
    results, notes = group.results, memory_notes(group)
    notes += [f"Template: {said}." for said in dict.fromkeys(f"{r.template}; {r.ends}" for r in results if r.template)]
    n_samples = next((r.loss_samples for r in results if r.loss_samples), 8)
    notes.append(f"Loss: of the first {n_samples} training samples, without dropout.")
    if counts := held_out_counts(group):
        several = f" to {counts[-1]:,.0f}" if len(counts) > 1 else ""
        accuracy = "token accuracy: the share of their target tokens that the model finds most probable"
        held_out = f"{counts[0]:,.0f}{several} samples (data.validation), never trained on"
        notes.append(f"Held-out loss: of {held_out}; {accuracy}.")
        if any(r.eval_loss != r.last_eval_loss for r in results):
            notes.append("With training.keep_best=true, both are of the best weights.")
    if names := [group.labels[n] for n in members(group)]:
        notes.append(f"Pareto-optimal in memory, time and held-out loss: {'; '.join(names)}.")
    return notes


def failures(group: Group, names: Sequence[str]) -> list[str]:
    """The errors of failed runs that no mark explains, each once, after the names of their rows."""
    failed = [(str(run.result.error), run.named(names[n])) for n, run in group.runs if run.result.status in FAILED]
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason(failed).items()]
