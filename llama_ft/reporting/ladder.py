"""Runs of several recipes as a ladder: the settings that each rung adds to an earlier one, and their effect."""

from collections.abc import Iterable, Sequence

from llama_ft.config.techniques import LABELS
from llama_ft.records.plan import PlanRow
from llama_ft.records.result import Result
from llama_ft.reporting.results import Group, value_of
from llama_ft.reporting.settings import RECIPE, as_typed
from llama_ft.reporting.table import UNKNOWN, Rows, Table, amount
from llama_ft.reporting.table2 import Measure, cell

MAX_NAME_LENGTH = 32  # characters of a line of a rung's name
MEMORY, TIME = "peak_memory_mib", "runtime_s"
NOTE = (
    "×above: relative to the earlier row that differs in the fewest settings (of several, the last), to which a rung"
    " adds what is new. ×first: relative to the first row. 0.50 is half as much."
)


def is_ladder(group: Group) -> bool:
    """Return True if a group is shown as a ladder: its runs differ in their recipes and what those set."""
    return bool(group.settings) and list(group.settings[0]) == [RECIPE]


def changes(group: Group, number: int, base: int) -> list[str]:
    """The settings that one run has and another has not, such as `+LoRA` and `mp.frozen_weights=nf4`."""
    here, there = group.results[number].optim, group.results[base].optim
    switched = [name for name in LABELS if here.get(name, False) != there.get(name, False)]
    switches = [f"{'+' if here.get(name) else '-'}{LABELS[name]}" for name in switched]
    own, others = group.values[number], group.values[base]
    keys = [key for key in own if key != RECIPE and as_typed(own[key]) != as_typed(others.get(key))]
    return switches + [f"{key}={as_typed(own[key])}" for key in keys]


def base_of(group: Group, number: int) -> int | None:
    """The earlier row that a run is compared with; None for the first."""
    return min(range(number), key=lambda base: (len(changes(group, number, base)), -base), default=None)


def ladder_table(
    group: Group, records: Sequence[Result | PlanRow], others: Iterable[Measure], notes: list[str], title: str = ""
) -> Table:
    """A row for each rung: peak memory and runtime, also relative to earlier rungs, and `others` that have a value."""
    bases = [base_of(group, number) for number in range(len(records))]
    columns: list[tuple[str, list[str]]] = []
    timed = any(value_of(record, TIME) is not None for record in records)
    for name, unit, key in (("peak MiB", "MiB", MEMORY), ("runtime s", "s", TIME))[: 1 + timed]:
        columns.append((name, [cell(record, key) for record in records]))
        columns.append((f"{unit}×above", [_share(records, n, base, key) for n, base in enumerate(bases)]))
        columns.append((f"{unit}×first", [_share(records, n, 0, key) for n in range(len(records))]))
    known = [each for each in others if any(getattr(record, each.key) is not None for record in records)]
    columns += [(each.title, [cell(record, each.key, each.form) for record in records]) for each in known]
    rows: Rows = [(name, [cells[n] for _, cells in columns]) for n, name in enumerate(rungs(group))]
    notes, head = [NOTE, *interactions(group, records), *notes], [name for name, _ in columns]
    head_row = [("rung: what is new", head)]
    return Table(title or group.title, head_row, rows, notes, len(head), max_name_length=MAX_NAME_LENGTH)


def rungs(group: Group) -> list[str]:
    """Each row's name, with its new settings."""
    names = []
    for number, label in enumerate(group.labels):
        base = base_of(group, number)
        unknown = UNKNOWN in group.values[number].values()
        names.append(label if base is None or unknown else f"{label}: {', '.join(changes(group, number, base))}")
    return names


def interactions(group: Group, records: Sequence[Result | PlanRow]) -> list[str]:
    """For each step that more than one rung takes, its effect on the peak in each place."""
    places: dict[str, list[str]] = {}
    for number, record in enumerate(records):
        if (base := base_of(group, number)) is not None:
            before, after = value_of(records[base], MEMORY), value_of(record, MEMORY)
            if before is not None and after is not None:
                change = ("-" if after < before else "+") + amount(abs(after - before))
                step = ", ".join(changes(group, number, base))
                places.setdefault(step, []).append(f"{change} MiB on {group.labels[base]}")
    return [f"{step}: {', '.join(found)}." for step, found in places.items() if step and len(found) > 1]


def _share(records: Sequence[Result | PlanRow], number: int, base: int | None, key: str) -> str:
    """A row's value as a multiple of another row's; a dash if either is unknown."""
    value, of = value_of(records[number], key), None if base is None else value_of(records[base], key)
    return UNKNOWN if value is None or not of else f"{value / of:.2f}"
