"""The course's Table 2: a column for each combination; peak memory and runtime, absolute and relative to baseline."""

import codecs
import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from llama_ft.records import CATEGORIES
from llama_ft.reporting.results import COURSE, LABELS, TECHNIQUES, Group, limit_of

MAIN = ("Peak memory", "Runtime")  # how the rows begin that the table is about
CHANGED = "changed"  # for the difference between a number and a mark
# For terminals whose encoding lacks them.
SUBSTITUTES = {"×": "x", "–": "-", "·": "-", "→": ">", "↑": "^", "↓": "v"}
MARKS = {"oom": "×", "killed": "killed", "interrupted": "stopped", "error": "error"}


@dataclass(frozen=True)
class Table:
    """Text cells, ready for any of the renderers below."""

    title: str
    techniques: list[tuple[str, list[str]]]  # the heading: a row for each technique, ON or OFF in each column
    rows: list[tuple[str, list[str]]]
    notes: list[str]
    most_columns: int = 8  # beside each other on a terminal: GC off, then GC on
    gap: int = 1  # between columns on a terminal
    longest_name: int | None = None  # of a row, in characters, beyond which a terminal breaks it


def is_failure(cell: str) -> bool:
    """Whether a cell says that a run fails, with or without a number before the mark."""
    return cell in MARKS.values() or cell.endswith(f" {MARKS['oom']}")


def table2(group: Group) -> Table:
    """The measured table of a group."""
    results = group.results
    shown = [name for name in TECHNIQUES if name in COURSE or any(r["optim"][name] for r in results)]
    techniques = [(LABELS[name], ["ON" if r["optim"][name] else "OFF" for r in results]) for name in shown]
    rows: list[tuple[str, list[str]]] = []

    def add(text: str, key: str, form: Callable[[float], str] = amount) -> None:
        if any(r[key] is not None for r in results) or key in ("peak_memory_mib", "runtime_s"):
            rows.append((text, [_cell(r, key, form) for r in results]))

    add("Peak memory, MiB", "peak_memory_mib")
    rows.append(("  of baseline", _relative(group, "peak_memory_mib")))
    add("Reserved, MiB", "peak_memory_reserved_mib")
    add("Peak RSS, MiB", "peak_rss_mib")
    add("Runtime, s", "runtime_s")
    rows.append(("  of baseline", _relative(group, "runtime_s")))
    add("Tokens/s", "tokens_per_s")
    add("Loss before", "train_loss_before", "{:.3f}".format)
    add("Loss after", "train_loss_after", "{:.3f}".format)
    return Table(group.title, techniques, rows, _notes(group))


def amount(value: float) -> str:
    """Three figures at least, no more decimals than that needs, thousands marked."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cell(result: dict[str, Any], key: str, form: Callable[[float], str]) -> str:
    if result["status"] != "ok":
        return MARKS[result["status"]]
    return "–" if result[key] is None else form(result[key])


def _relative(group: Group, key: str) -> list[str]:
    base = group.baseline
    if base is None or not base[key]:
        return ["–"] * len(group.results)
    return [_cell(r, key, lambda value: f"{value / base[key]:.0%}") for r in group.results]


def technique_notes(optims: list[dict[str, bool]], settings: dict[str, Any], batch: int) -> list[str]:
    """What the techniques do in a table's columns.

    Args:
        settings: of the techniques, by technique.
        batch: samples of a micro-batch.
    """
    notes = []
    if any(optim["ga"] for optim in optims):
        steps = settings["ga"]["steps"]
        notes.append(f"GA: micro-batches of {batch}, an update every {steps * batch} samples instead of every {batch}.")
    if any(optim["mp"] and optim["lora"] for optim in optims):
        if settings["mp"]["frozen_weights"] == "compute":
            notes.append("MP with LoRA: frozen weights are stored in 16 bit; mp.frozen_weights=fp32 is the plain AMP.")
        else:
            notes.append("MP with LoRA: frozen weights are stored in fp32 (plain AMP).")
    return notes


def _notes(group: Group) -> list[str]:
    results = group.results
    began = next((r for r in results if r["config_hash"]), results[0])  # a refused run's values may be any
    notes = technique_notes([r["optim"] for r in results], began["techniques"], began["micro_batch_size"])
    if dtypes := sorted({r["compute_dtype"] for r in results if r["optim"]["mp"] and r["compute_dtype"]}):
        notes.append(f"MP computes in {' and '.join(dtypes)}.")
    if skipped := [f"{r['combination']} {r['skipped_steps']}" for r in results if r["skipped_steps"]]:
        notes.append(f"Optimizer steps skipped while the loss scale was too large: {', '.join(skipped)}.")
    if not any(r["optim"]["gc"] for r in results):
        notes.append("GC is off.")
    if any(r["peak_memory_reserved_mib"] for r in results):
        notes.append("Peak memory: the CUDA allocator's max allocated.")
    else:
        notes.append("Peak memory: bytes of tensors, counted in a separate pass; RSS: the whole process.")
    limit, gpu = limit_of(results), results[0]["gpu"]
    if gpu not in ("auto", "cpu") and limit is not None and any(r["device"] for r in results):
        notes.append(
            f"gpu={gpu}: the allocator has that card's {limit:,} MiB; times are those of the device named above."
        )
    if any(r["status"] == "oom" for r in results):
        on_cpu = any(r["status"] == "ok" and not r["peak_memory_reserved_mib"] for r in results)
        holder = " on the process's data" if on_cpu else ""  # tensors are a part of it
        notes.append("×: out of memory" + (f" (limit {limit:,} MiB{holder})." if limit else "."))
    notes.append("Loss: of the first 8 training samples, without dropout.")
    failed = [r for r in results if r["status"] in ("killed", "interrupted", "error")]
    notes += [f"{r['combination']}: {' '.join(str(r['error']).split())}" for r in failed]
    return notes


def terminal(table: Table, width: int) -> list[RichTable]:
    """For a terminal: one table, or several below each other where it is too narrow. Numbers are never cut."""
    rows = [*table.techniques, *table.rows]
    name_width = max(len(name) for name, _ in rows)
    breaks_names = table.longest_name is not None and name_width > table.longest_name
    if breaks_names:
        name_width = table.longest_name or 0
    column_width = table.gap + max(len(cell) for _, cells in rows for cell in cells)
    fitting = max(1, min(table.most_columns, (width - name_width) // column_width))
    parts = []
    for start in range(0, len(table.techniques[0][1]), fitting):
        columns = slice(start, start + fitting)
        view = RichTable(
            box=box.SIMPLE, show_header=False, show_edge=False, padding=(0, 0, 0, table.gap - 1), pad_edge=False
        )
        view.add_column(
            no_wrap=not breaks_names,
            overflow="fold" if breaks_names else "ellipsis",
            width=name_width if breaks_names else None,
        )
        for _ in table.techniques[0][1][columns]:
            view.add_column(justify="right", no_wrap=True)
        for name, cells in table.techniques:
            view.add_row(*map(Text, (name, *cells[columns])))  # Text: what is in brackets is no markup
        view.add_section()
        for name, cells in table.rows:
            style = "bold" if name.startswith(MAIN) or not any(cells) else None
            view.add_row(Text(name), *(Text(cell, _colour(cell)) for cell in cells[columns]), style=style)
        parts.append(view)
    return parts


def _colour(cell: str) -> str:
    return "red" if is_failure(cell) else "yellow" if cell == CHANGED else ""


def print_table(table: Table, console: Console) -> None:
    """The table with its title and notes. Lines are broken at a terminal's width; in a file each stays whole."""
    make_encodable(console)
    console.print(f"\n{table.title}\n", style="bold", highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for view in terminal(table, console.width):
        console.print(view)
        console.print()
    print_notes(table.notes, console)


def make_encodable(console: Console) -> None:
    """Let a console put plain letters in place of those that its encoding lacks."""
    reconfigure = getattr(console.file, "reconfigure", None)
    if reconfigure is not None and not console.encoding.lower().startswith("utf"):
        codecs.register_error("llama_ft.substitute", _substitute)
        reconfigure(errors="llama_ft.substitute")


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SUBSTITUTES.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def print_notes(lines: list[str], console: Console) -> None:
    """Notes, each on a line of its own."""
    for line in lines:
        if console.is_terminal:
            console.print(Padding(Text(line, "dim"), (0, 0, 0, 2), expand=False))
        else:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def markdown(table: Table) -> str:
    """For `table2.md`."""
    rows = [f"| {name.strip()} | {' | '.join(cells)} |" for name, cells in [*table.techniques, *table.rows]]
    rule = "|---|" + "---:|" * len(table.techniques[0][1])
    return "\n".join(
        [f"### {' '.join(table.title.split())}", "", rows[0], rule, *rows[1:], "", *(f"- {n}" for n in table.notes), ""]
    )


def records(groups: list[Group]) -> tuple[list[str], list[list[Any]]]:
    """Columns, and a row for each run, numbers unrounded."""
    plain = (
        "model data gpu device status error peak_memory_mib peak_memory_reserved_mib peak_rss_mib runtime_s samples"
        " tokens tokens_per_s trainable_params total_params trainable_percent train_loss_before train_loss_after"
        " compute_dtype skipped_steps config_hash"
    ).split()
    by_category = [f"memory_mib.{c}" for c in CATEGORIES] + [f"memory_max_mib.{c}" for c in CATEGORIES]
    rows = []
    for group in groups:
        for result in group.results:
            values = [result[part] or {} for part in ("memory_mib", "memory_max_mib")]
            techniques = [result["optim"][name] for name in TECHNIQUES]
            row = [result["combination"], group.variant, *techniques, *(result[key] for key in plain)]
            rows.append(row + [value.get(category) for value in values for category in CATEGORIES])
    return ["combination", "variant", *TECHNIQUES, *plain, *by_category], rows


def csv_text(groups: list[Group]) -> str:
    """For `table2.csv`."""
    columns, rows = records(groups)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()
