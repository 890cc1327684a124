"""The course's two tables in its own form: Table 1 with a column for each technique, Table 2 with ON and OFF."""

import re
from collections.abc import Sequence

from llama_ft.config.techniques import BASELINE
from llama_ft.records.plan import Plan, arrow
from llama_ft.records.result import Result
from llama_ft.reporting.repeats import spread_of
from llama_ft.reporting.results import Group, baseline_of, planned_group
from llama_ft.reporting.table import MARKS, Table
from llama_ft.reporting.table2 import cell

COLUMNS = {"ga": "Grad. accumulation", "gc": "Grad. checkpoint", "mp": "Mixed precision", "lora": "LoRA"}
MEMORY = {
    "parameter": "Memory: parameter",
    "activation": "Memory: activation",
    "gradient": "Memory: gradient",
    "optimizer_state": "Memory: optimizer state",
}
COMPUTATION = "Computation"
HEAD = {"ga": "GA", "mp": "MP", "lora": "LoRA"}  # of Table 2
SAME_RUNTIME = 0.05  # share of the baseline's runtime up to which a difference is none
LATEX = str.maketrans(
    {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "×": r"$\times$", "–": "--", "±": r"$\pm$", "→": "to", "·": r"$\cdot$"}
)
ESCAPED = re.compile(r"([&%$#_{}])")


def course_tables(group: Group) -> list[Table]:
    """Tables 1 and 2 of a group of measured runs."""
    by_name = {result.combination: result for result in group.results}
    base = baseline_of(group.results)
    columns = [_measured_arrows(base, by_name.get(name)) for name in COLUMNS]
    notes = [
        f"↑ more, ↓ less, – at most 1 % apart: each category's own maximum in a run with this technique only, compared"
        f" with {BASELINE}. Computation: the runtime, – at most 5 % or within the spread of repeats.",
        "GA: the micro-batch is held, and the optimizer steps less often. Where the effective batch is held instead, GA"
        " lowers activations.",
    ]
    wanted = [] if base and base.memory_max_mib else [BASELINE]
    missing = wanted or [name for name, column in zip(COLUMNS, columns, strict=True) if not any(column)]
    if missing:
        notes.append(f"Blank: this sweep has no finished run of {', '.join(missing)}.")
    return [_table1(group.title, columns, notes), _table2(group, group.title)]


def planned_course_tables(plan: Plan) -> list[Table]:
    """Tables 1 and 2 of a plan for one GPU: of Table 1's rows, the first of each technique."""
    group = planned_group(plan, plan.gpus[0])
    rows = list(plan.table1.rows if plan.table1 else [])
    first = {row.technique: row for row in reversed(rows)}
    parts = (*MEMORY, "computation")
    columns = [[first[name].cells[part].arrow if name in first else "" for part in parts] for name in COLUMNS]
    notes = [f"{label}: {first[name].choice}." for name, label in COLUMNS.items() if name in first]
    runtimes = [f"Runtime: {' '.join(plan.time.about.split())}."]
    title = f"{group.title} · predicted"
    return [_table1(title, columns, notes), _table2(group, title, runtimes)]


def _table1(title: str, columns: Sequence[list[str]], notes: list[str]) -> Table:
    names = [*MEMORY.values(), COMPUTATION]
    rows = [(name, [column[n] for column in columns]) for n, name in enumerate(names)]
    return Table(f"Table 1 · {title}", [("", list(COLUMNS.values()))], rows, notes)


def _measured_arrows(base: Result | None, result: Result | None) -> list[str]:
    if base is None or result is None or result.status != "ok" or not (base.memory_max_mib and result.memory_max_mib):
        return [""] * (len(MEMORY) + 1)
    before, after = base.memory_max_mib, result.memory_max_mib
    arrows = [arrow(before.get(part, 0.0), after.get(part, 0.0)) for part in MEMORY]
    was, is_now = base.runtime_s or 0.0, result.runtime_s or 0.0
    spread = sum(spread_of(each, "runtime_s") or 0.0 for each in (base, result))
    return [*arrows, arrow(was, is_now, max(SAME_RUNTIME, spread / was) if was else SAME_RUNTIME)]


def _table2(group: Group, title: str, more_notes: Sequence[str] = ()) -> Table:
    """Peak memory and runtime of the eight combinations of GA, MP and LoRA; GC is off."""
    others = {name for result in group.results for name in result.optim} - HEAD.keys()
    results = [result for result in group.results if not any(result.optim.get(name) for name in others)]
    head = [(HEAD[name], ["ON" if result.optim.get(name) else "OFF" for result in results]) for name in HEAD]
    rows = [
        ("Peak Mem, MiB", [cell(result, "peak_memory_mib") for result in results]),
        ("Runtime, s", [cell(result, "runtime_s") for result in results]),
    ]
    samples = next((result.samples for result in results if result.samples), None)
    notes = [f"Runtime: of {samples:,} samples." if samples else "Runtime: of the whole run.", *more_notes]
    if any(result.status == "oom" for result in results):
        notes.append(f"{MARKS['oom']}: out of memory.")
    return Table(f"Table 2 · {title}", head, rows, notes)


def latex(table: Table) -> str:
    """A table for `\\input` into a document that loads booktabs."""
    n_columns = len(table.head[0][1])
    lines = [" & ".join(map(_escaped, (name, *cells))) + r" \\" for name, cells in (*table.head, *table.rows)]
    lines.insert(len(table.head), r"\midrule")
    notes = [rf"\\ \footnotesize {_escaped(note)}" for note in table.notes]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(table.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * n_columns}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return ESCAPED.sub(r"\\\1", text).translate(LATEX)
