"""The tables of a plan, and the notes under them: Table 2 predicted, for one card or for several; Table 1 computed."""

from collections.abc import Callable

from llama_ft.records import CATEGORIES
from llama_ft.records.plan import Plan, Table1, Table1Cell
from llama_ft.reporting.ladder import is_ladder, ladder_table
from llama_ft.reporting.results import planned_group
from llama_ft.reporting.run_table import setting_rows
from llama_ft.reporting.table import MARKS, UNKNOWN, Rows, Table, amount, by_reason, technique_rows
from llama_ft.reporting.table2 import Measure, cell, measure_rows, technique_notes

# The phases of memory peaks, short enough for eight columns side by side.
SHORT_PHASES = {"forward": "fwd", "backward": "bwd", "optimizer step": "step"}
TABLE1_COLUMNS = (*CATEGORIES[:4], "computation")
MAX_CHOICE_LENGTH = 28
TOO_LARGE = "×: needs more memory than the card has."


def _fits(fits: bool) -> str:
    return "yes" if fits else MARKS["oom"]


FIT = (Measure("needed", "required_mib"), Measure("fits", "fits", _fits), Measure("margin", "margin_mib"))
SENT = "sent_mib"


def tables_of(plan: Plan) -> list[Table]:
    """All tables, in the order in which they are shown."""
    if len(plan.gpus) == 1:
        tables = [_runs_table(plan) if plan.is_sweep else card_table(plan)]
    else:
        runtime = "runtime, s at best" if plan.time.kind == "bound" else "runtime, s"
        notes = [TOO_LARGE] if any(row.fits is False for row in plan.rows) else []
        tables = [
            _cards_table(plan, "MiB needed", "required_mib", plan_notes(plan)),
            _cards_table(plan, runtime, "runtime_s", notes + time_notes(plan)),
        ]
    return tables + ([table1(plan.table1)] if plan.table1 else [])


def title(plan: Plan) -> str:
    """The title of a plan, in the form of a measured table's."""
    return f"{plan.model} · {plan.data.name}, {plan.data.samples} samples · {cards(plan)} · predicted"


def cards(plan: Plan) -> str:
    """The cards of a plan: a name, or the number of kinds, and how many of them a run uses."""
    name = plan.gpus[0]["name"] if len(plan.gpus) == 1 else f"{len(plan.gpus)} GPUs"
    splits = [row.parallel or {"processes": 1} for row in plan.rows]
    if not any(row.parallel for row in plan.rows):
        return str(name)
    *others, most = sorted({split["processes"] for split in splits})
    numbers = f"{', '.join(map(str, others))} or {most}" if others else str(most)
    strategies = dict.fromkeys(split["strategy"] for split in splits if "strategy" in split)
    return f"{numbers} × {name} ({', '.join(strategies)}), per card"


def is_at_best(plan: Plan) -> bool:
    """Return True if the runtimes are bounds."""
    return plan.time.kind == "bound" and any(row.runtime_s is not None for row in plan.rows)


def card_table(plan: Plan) -> Table:
    """Table 2 of a card: a column for each combination."""
    runtime = "Runtime, at best" if is_at_best(plan) else "Runtime, s"
    measures = (
        Measure("Peak memory, MiB", "peak_memory_mib", always=True, relative=True),
        Measure("  during", "peak_phase", lambda phase: SHORT_PHASES.get(phase, phase)),
        Measure("Reserved, MiB", "reserved_mib"),
        Measure("Needed, MiB", "required_mib"),
        Measure("Fits", "fits", _fits, always=True),
        Measure("Margin, MiB", "margin_mib"),
        Measure(runtime, "runtime_s", always=True, relative=True),
        Measure("Tokens/s", "tokens_per_s"),
        Measure("Sent, MiB/update", SENT),
        Measure("Bound by", "binds", str),
    )
    head = technique_rows(row.optim for row in plan.rows)
    return Table(title(plan), head, measure_rows(plan.rows, measures), plan_notes(plan))


def _runs_table(plan: Plan) -> Table:
    rows, group, notes = plan.rows, planned_group(plan, plan.gpus[0]), plan_notes(plan)
    if is_ladder(group):
        return ladder_table(group, rows, FIT[:2], notes, title(plan))
    measures = (
        Measure("peak MiB", "peak_memory_mib", always=True),
        *FIT,
        Measure("runtime s", "runtime_s", always=True),
        Measure("sent MiB/update", SENT),
        *([Measure("bound by", "binds", str)] if any(row.parallel for row in rows) else []),
    )
    known = [m for m in measures if m.always or any(getattr(row, m.key) is not None for row in rows)]
    columns = {each.title: [cell(row, each.key, each.form) for row in rows] for each in known}
    return setting_rows(group, columns, notes, title(plan))


def _cards_table(plan: Plan, what: str, key: str, notes: list[str]) -> Table:
    sizes = [amount(gpu["memory_mib"]) if gpu["memory_mib"] else UNKNOWN for gpu in plan.gpus]
    head = [("GPU", [gpu["name"] for gpu in plan.gpus]), ("Memory, MiB", sizes)]
    columns = [plan.rows_on(gpu["name"]) for gpu in plan.gpus]
    rows: Rows = [
        (label, [cell(row, key) + (f" {MARKS['oom']}" if row.fits is False else "") for row in alike])
        for label, *alike in zip(planned_group(plan, plan.gpus[0]).labels, *columns, strict=True)
    ]
    return Table(f"{title(plan)}: {what}", head, rows, notes, max_columns=len(plan.gpus))


def table1(content: Table1) -> Table:
    """Table 1: how much each technique adds to, or takes from, each part of memory and the computation."""
    units: dict[str, str | None] = {}  # of a column, if all its cells have one in common
    for name in TABLE1_COLUMNS:
        all_units = {row.cells[name].unit for row in content.rows}
        units[name] = all_units.pop() if len(all_units) == 1 else None
    heading = [name.replace("_", " ").capitalize() + (f", {unit}" if unit else "") for name, unit in units.items()]
    rows: Rows = []
    for row in content.rows:
        cells = [_change(row.cells[name], with_unit=unit is None) for name, unit in units.items()]
        rows.append((f"{row.name}: {row.choice}" if row.choice else row.name, cells))
    notes = [f"Baseline: {content.baseline}", *content.notes]
    title = "What each technique changes, computed"
    return Table(title, [("", heading)], rows, notes, max_name_length=MAX_CHOICE_LENGTH, gap=3)


def _change(change: Table1Cell, with_unit: bool) -> str:
    """The arrow with the numbers behind it, with enough decimals to tell them apart."""
    before, after, unit = change.before, change.after, f" {change.unit}" if with_unit else ""
    if before == after:
        return f"{change.arrow} {amount(before)}{unit}"
    forms: list[Callable[[float], str]] = [amount, *(f"{{:,.{n}f}}".format for n in (1, 2, 3))]
    form = next((form for form in forms if form(before) != form(after)), "{:,.6g}".format)
    return f"{change.arrow} {form(before)} → {form(after)}{unit}"


def plan_notes(plan: Plan) -> list[str]:
    """The notes on a plan's table; those on runtimes only for one card, since several have a separate table."""
    notes = ([] if plan.is_sweep else _setting_notes(plan)) + _parallel_notes(plan)
    if managed := max((row.managed_mib or 0.0 for row in plan.rows), default=0.0):
        where = "in managed memory, and not counted here: the driver moves them to the host if the card is full"
        notes.append(f"Up to {amount(managed)} MiB of optimizer state are {where}.")
    computed = sorted({dtype for row in plan.rows if row.optim.get("mp") for dtype in row.flops or {}} - {"float32"})
    if computed:
        notes.append(f"MP computes in {' and '.join(computed)}.")
    if plan.training.get("compile"):
        notes.append("training.compile is not modeled: memory and times are those of layers that are not compiled.")
    if host_mib := [row.host_memory_mib for row in plan.rows if row.host_memory_mib is not None]:
        notes.append(f"Offloaded: up to {max(host_mib):,.0f} MiB in host memory; runtimes do not include copying.")
    notes += [*_memory_notes(plan), f"Data: {' '.join(plan.data.about.split())}."]
    if len(plan.gpus) == 1:
        notes += time_notes(plan)
    failed = [row for row in plan.rows if row.error]
    cards = by_reason((row.error or "", row.gpu) for row in failed)
    first = plan.rows_on(plan.gpus[0]["name"])
    names = planned_group(plan, plan.gpus[0]).labels if plan.is_sweep else [row.combination for row in first]
    names_of = {row.key: name for row, name in zip(first, names, strict=True)}
    for why, names in by_reason((row.error or "", names_of[row.key]) for row in failed).items():
        on = f" on {', '.join(cards[why])}" if len(plan.gpus) > 1 else ""
        notes.append(f"{', '.join(names)}{on}: {why}")
    return notes


def _setting_notes(plan: Plan) -> list[str]:
    optims = [row.optim for row in plan.rows]
    size, packing = plan.training["micro_batch_size"], plan.training.get("packing")
    optimizer = plan.training.get("optimizer", "adamw")
    notes = technique_notes(optims, plan.techniques, size, packing)
    if packing is None and not any(optim.get("ga") for optim in optims):
        notes.append(f"Micro-batches of {size} (training.micro_batch_size), an update after each.")
    if any(optim.get("mp") for optim in optims) and plan.techniques["mp"]["trainable_weights"] == "compute":
        also = " and gradients" if "8bit" in optimizer else ", gradients and optimizer state"
        notes.append(f"MP: trainable weights{also} are in 16 bit too.")
    if optimizer == "sgd":
        notes.append(f"The optimizer is SGD with momentum {plan.training['momentum']:g}.")
    if "8bit" in optimizer:
        notes.append("The optimizer is AdamW with moments in 8 bits.")
    if plan.training.get("optimizer_in_backward"):
        notes.append("Each weight is updated within the backward pass, as soon as its gradient is computed.")
    return notes


def _parallel_notes(plan: Plan) -> list[str]:
    """Notes on the numbers of runs that are split over cards."""
    if not any(row.parallel for row in plan.rows):
        return []
    gathered = any((row.memory_max_mib or {}).get("gathered") for row in plan.rows)
    notes = [
        "Per card: memory is that of the first, which has the most; tokens/s are of all cards together.",
        "Sent: to other cards in an update, in a ring; as much is received. Computing and sending overlap.",
    ]
    if gathered:
        notes.append("Gathered: other cards' rows of weights while they are used, and gradients on their way to them.")
    rates = {gpu["name"]: gpu.get("link_gb_s") for gpu in plan.gpus}
    known = [f"{rate:g} GB/s (gpu.link_gb_s)" for rate in rates.values() if rate]
    return [*notes, f"Link to other cards: {', '.join(dict.fromkeys(known))} in each direction."] if known else notes


def _memory_notes(plan: Plan) -> list[str]:
    gpus, rows = plan.gpus, plan.rows
    if not any(row.reserved_mib is not None for row in rows):
        notes = ["Peak memory: bytes of tensors."]
    else:
        notes = [
            "Peak memory: tensors, each rounded up as the CUDA allocator does, and cuBLAS workspaces.",
            "Reserved: by a model of PyTorch's allocator with expandable segments, given the step's tensors.",
        ]
        sizes = sorted({gpu["context_mib"] for gpu in gpus if gpu["context_mib"]})
        unknown = [gpu["name"] for gpu in gpus if not gpu["context_mib"] and gpu["device"] == "cuda"]
        context = " to ".join(f"{size:,}" for size in dict.fromkeys((*sizes[:1], *sizes[-1:])))
        needed = f"reserved, and {context} MiB for the CUDA context and its libraries" if sizes else "reserved"
        if unknown:
            needed += f"; the CUDA context of {', '.join(unknown)} is not known (gpu.context_mib) and not counted"
        if len(gpus) == 1 and gpus[0]["memory_mib"]:
            needed += f"; {gpus[0]['name']} has {gpus[0]['memory_mib']:,} MiB"
        notes.append(f"Needed: {needed}.")
    if any(row.fits is False for row in rows):
        notes.append(TOO_LARGE)
    if any(row.fits is None and not row.error for row in rows):
        notes.append("–: not known, since no profile states the memory.")
    if len(gpus) == 1 and not plan.is_sweep:
        during = dict.fromkeys(row.peak_phase for row in rows if row.peak_phase in SHORT_PHASES)
        notes += [f"During: {', '.join(f'{SHORT_PHASES[phase]} is {phase}' for phase in during)}."] if during else []
    return notes


def time_notes(plan: Plan) -> list[str]:
    """Notes on the runtimes, and on cards without any."""
    about = f"Runtime: seconds, {' '.join(plan.time.about.split())}."
    if plan.time.kind == "calibrated":
        return [about]
    notes = [about] if any(row.runtime_s is not None for row in plan.rows) else []
    without = dict.fromkeys(row.gpu for row in plan.rows if row.runtime_s is None and not row.error)
    return notes + ([f"Runtime is not known without rates: gpu={', '.join(without)}."] if without else [])
