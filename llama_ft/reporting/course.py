"""The course's two tables in its own form: Table 1 with a column for each technique, Table 2 with ON and OFF."""

from collections.abc import Sequence
from dataclasses import replace

from llama_ft.config.techniques import BASELINE, COURSE, combinations
from llama_ft.records.plan import Plan, arrow
from llama_ft.records.result import Result
from llama_ft.reporting.plan_tables import plan_notes, time_notes
from llama_ft.reporting.repeats import spread_of
from llama_ft.reporting.results import Group, baseline_of, planned_group
from llama_ft.reporting.table import Table
from llama_ft.reporting.table2 import RUNS, cell, failures, memory_notes, run_counts, technique_notes

COLUMNS = {"ga": "Grad. accumulation", "gc": "Grad. checkpoint", "mp": "Mixed precision", "lora": "LoRA"}
MEMORY = {
    "parameter": "Memory: parameter",
    "activation": "Memory: activation",
    "gradient": "Memory: gradient",
    "optimizer_state": "Memory: optimizer state",
}
COMPUTATION = "Computation"
HEAD = {each.name: each.label for each in COURSE}  # of Table 2
SAME_RUNTIME = 0.05  # share of the baseline's runtime up to which a difference is none
LATEX = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "×": r"$\times$", "–": "--", "±": r"$\pm$", "→": "to"}
LATEX |= {"·": r"$\cdot$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: rf"\{character}" for character in "&%$#_{}"}
ESCAPES = {ord(character): text for character, text in LATEX.items()}


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
    if not any(map(any, columns)):
        notes = []
    missing = [name for name in (BASELINE, *COLUMNS) if not _has_memory(by_name.get(name))]
    if missing:
        notes.append(f"Blank: this sweep has no finished run of {', '.join(missing)}.")
    shown = replace(group, rows=[row for row in group.rows if _is_in_course(row.result)])
    elsewhere = ["Combinations with GC are in table2.md."] if len(shown.rows) < len(group.rows) else []
    return [_table1(group.title, columns, notes), _table2(shown.results, group.title, _table2_notes(shown) + elsewhere)]


def planned_course_tables(plan: Plan) -> list[Table]:
    """Tables 1 and 2 of a plan for one GPU: of Table 1's rows, the first of each technique."""
    group = planned_group(plan, plan.gpus[0])
    rows = list(plan.table1.rows if plan.table1 else [])
    first = {row.technique: row for row in reversed(rows)}
    parts = (*MEMORY, "computation")
    columns = [[first[name].cells[part].arrow if name in first else "" for part in parts] for name in COLUMNS]
    notes = [f"{label}: {first[name].choice}." for name, label in COLUMNS.items() if name in first]
    title, for_table2 = f"{group.title} · predicted", plan_notes(plan)
    if len(plan.gpus) > 1:
        for_table2 += time_notes(plan)
    results = [result for result in group.results if _is_in_course(result)]
    return [_table1(title, columns, notes), _table2(results, title, for_table2)]


def _table1(title: str, columns: Sequence[list[str]], notes: list[str]) -> Table:
    names = [*MEMORY.values(), COMPUTATION]
    rows = [(name, [column[n] for column in columns]) for n, name in enumerate(names)]
    return Table(f"Table 1 · {title}", [("", list(COLUMNS.values()))], rows, notes)


def _measured_arrows(base: Result | None, result: Result | None) -> list[str]:
    if base is None or result is None or not (_has_memory(base) and _has_memory(result)):
        return [""] * (len(MEMORY) + 1)
    before, after = base.memory_max_mib or {}, result.memory_max_mib or {}
    arrows = [arrow(before.get(part, 0.0), after.get(part, 0.0)) for part in MEMORY]
    was, is_now = base.runtime_s or 0.0, result.runtime_s or 0.0
    spread = sum(spread_of(each, "runtime_s") or 0.0 for each in (base, result))
    return [*arrows, arrow(was, is_now, max(SAME_RUNTIME, spread / was) if was else SAME_RUNTIME)]


def _has_memory(result: Result | None) -> bool:
    return result is not None and result.status == "ok" and bool(result.memory_max_mib)


def _is_in_course(result: Result) -> bool:
    """True if only techniques are on that the course's Table 2 has."""
    return not any(is_on and name not in HEAD for name, is_on in result.optim.items())


def _table2(results: Sequence[Result], title: str, notes: list[str]) -> Table:
    """Peak memory and runtime of the eight combinations of GA, MP and LoRA; GC is off."""
    head = [(name, ["ON" if result.optim.get(key) else "OFF" for result in results]) for key, name in HEAD.items()]
    rows = [
        ("Peak Mem, MiB", [cell(result, "peak_memory_mib") for result in results]),
        ("Runtime, s", [cell(result, "runtime_s") for result in results]),
    ]
    if counts := run_counts(results):
        rows.append((RUNS, counts))
    if missing := [on.combination for on in combinations() if on.combination not in {r.combination for r in results}]:
        notes = [*notes, f"Not run: {', '.join(missing)}."]
    return Table(f"Table 2 · {title}", head, rows, notes)


def _table2_notes(group: Group) -> list[str]:
    """The notes on the course's Table 2 of measured runs."""
    results = group.results
    samples = next((result.samples for result in results if result.samples), None)
    notes = [f"Runtime: of {samples:,} samples." if samples else "Runtime: of the whole run."]
    if began := next((result for result in results if result.config_hash), None):
        optims = [result.optim for result in results]
        notes += technique_notes(optims, began.techniques, began.micro_batch_size, began.packing) + memory_notes(group)
    return notes + failures(group, [result.combination for result in results])


def latex(table: Table) -> str:
    """A table for `\\input` into a document that loads booktabs and graphicx, which narrows it to the text's width."""
    n_columns = len(table.head[0][1])
    lines = [" & ".join(map(_escaped, (name, *cells))) + r" \\" for name, cells in (*table.head, *table.rows)]
    lines.insert(len(table.head), r"\midrule")
    notes = [rf"\\ \footnotesize {_escaped(note)}" for note in table.notes]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(table.title)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * n_columns}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            *notes,
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return text.translate(ESCAPES)
