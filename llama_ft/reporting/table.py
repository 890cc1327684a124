"""Tables of text: on a terminal, as Markdown, as CSV; and the texts in their cells."""

import codecs
import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from llama_ft.config.techniques import TECHNIQUES, shown_techniques
from llama_ft.records.plan import PlanRow
from llama_ft.records.result import Result

MAIN = ("Peak memory", "Runtime")  # beginnings of a table's main rows
PLUS_MINUS = " ± "  # between a mean and its spread
CHANGED, UNKNOWN = "changed", "–"  # for the difference between a number and a mark; for no number
# For terminals whose encoding lacks them.
SUBSTITUTES = str.maketrans("×–·→↑↓█⟦⟧", "x-->^v#[]") | {ord("±"): "+-"}
MARKS = {"oom": "×", "killed": "killed", "interrupted": "stopped", "error": "error"}
FORMULA = re.compile(r"[=@\t\r]|[+-](?![\d.]+(e[+-]?\d+)?$)")  # beginnings of a spreadsheet's formulas; not of numbers
NOT_IN_CSV = "command optim settings techniques breakdown timeline versions loss_samples card schema_version".split()

Rows = list[tuple[str, list[str]]]  # each a name and its cells


@dataclass(frozen=True)
class Table:
    """Text cells, ready for any of the renderers below."""

    title: str
    head: Rows
    rows: Rows
    notes: list[str]
    max_columns: int = 8  # side by side on a terminal: GC off, then GC on
    gap: int = 1  # between columns on a terminal
    max_name_length: int | None = None  # of a row, in characters, beyond which a terminal breaks it
    narrow_head: Rows | None = None  # for a terminal that is too narrow for the head and its gaps


def technique_rows(optims: Iterable[dict[str, bool]]) -> Rows:
    """A table's head: ON or OFF for each technique in each combination's column."""
    columns = list(optims)
    return [
        (shown.label, ["ON" if optim.get(shown.name) else "OFF" for optim in columns])
        for shown in shown_techniques(columns)
    ]


def amount(value: float) -> str:
    """Format a number with at least three figures, no more decimals than needed, and thousands separators."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def by_reason(entries: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names, each once, by their common reason in one line; each entry is a reason and a name."""
    names: dict[str, dict[str, None]] = {}
    for reason, name in entries:
        names.setdefault(" ".join(reason.split()), {})[name] = None
    return {reason: list(group) for reason, group in names.items()}


def is_failure(cell: str) -> bool:
    """Return True if a cell says that a run fails, with or without a number before the mark."""
    return cell in MARKS.values() or cell.endswith(f" {MARKS['oom']}")


def terminal(table: Table, width: int) -> list[RichTable]:
    """For a terminal: one table, or several below each other if it is too narrow. Numbers are never cut."""
    head, body, gap = table.head, table.rows, table.gap
    longest_name = max(len(name) for name, _ in (*head, *body))
    name_width = min(longest_name, table.max_name_length or longest_name)
    breaks_names = name_width < longest_name
    widths = _widths([*head, *body], gap)
    if table.narrow_head and name_width + sum(widths) > width:
        head, gap = table.narrow_head, 1
        widths = _widths([*head, *body], gap)
    if name_width + sum(widths[: table.max_columns]) > width:
        head, body = ([(n, [cell.replace(PLUS_MINUS, "±") for cell in c]) for n, c in part] for part in (head, body))
        widths = _widths([*head, *body], gap)
    n_fitting = max(1, min(table.max_columns, (width - name_width) // max(widths)))
    if len(widths) <= table.max_columns and name_width + sum(widths) <= width:
        n_fitting = len(widths)
    n_fitting = math.ceil(len(widths) / math.ceil(len(widths) / n_fitting))  # parts of equal width
    parts, padding = [], (0, 0, 0, gap - 1)
    for start in range(0, len(widths), n_fitting):
        columns = slice(start, start + n_fitting)
        view = RichTable(box=box.SIMPLE, show_header=False, show_edge=False, padding=padding, pad_edge=False)
        view.add_column(no_wrap=not breaks_names, overflow="fold", width=name_width if breaks_names else None)
        for _ in head[0][1][columns]:
            view.add_column(justify="right", no_wrap=True)
        for name, cells in head:
            view.add_row(*map(Text, (name, *cells[columns])))  # Text: brackets are not markup
        view.add_section()
        for name, cells in body:
            style = "bold" if name.startswith(MAIN) or not any(cells) else None
            colors = ["red" if is_failure(cell) else "yellow" if cell == CHANGED else "" for cell in cells[columns]]
            view.add_row(Text(name), *map(Text, cells[columns], colors), style=style)
        parts.append(view)
    return parts


def _widths(rows: Rows, gap: int) -> list[int]:
    return [gap + max(map(len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]


def print_table(table: Table, console: Console) -> None:
    """Print a table with its title and notes. Lines are wrapped at a terminal's width, but not in a file."""
    if isinstance(console.file, io.TextIOWrapper):
        console.file.reconfigure(errors="llama_ft.plain")
    console.print(f"\n{table.title}\n", style="bold", highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for view in terminal(table, console.width):
        console.print(view)
        console.print()
    print_notes(table.notes, console)


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end].translate(SUBSTITUTES)
    return lacking.encode("ascii", "replace").decode(), error.end


codecs.register_error("llama_ft.plain", _plain)


def print_notes(lines: list[str], console: Console) -> None:
    """Print notes, each on its own line."""
    for line in lines:
        if console.is_terminal:
            console.print(Padding(Text(line, "dim"), (0, 0, 0, 2), expand=False))
        else:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def markdown(table: Table) -> str:
    """A table with its title and notes, for a file such as `table2.md`."""
    lines = [[name, *cells] for name, cells in (*table.head, *table.rows)]
    rows = ["| " + " | ".join(map(plain_text, line)) + " |" for line in lines]
    rule = "|---|" + "---:|" * len(table.head[0][1])
    notes = [f"- {plain_text(note)}" for note in table.notes]
    return "\n".join([f"### {plain_text(table.title)}", "", rows[0], rule, *rows[1:], "", *notes, ""])


def plain_text(name: str) -> str:
    """Any text in one line, escaped so that Markdown takes nothing in it for markup."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(name.split()))


def record_table(
    records: Sequence[Result | PlanRow], leading: Sequence[dict[str, str]]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and a row for each record: leading values, switches, unrounded fields, and each key of a dict."""
    columns = [*leading[0], *(technique.name for technique in TECHNIQUES)]
    rows: list[list[Any]] = [
        [*values.values(), *(record.optim.get(technique.name, False) for technique in TECHNIQUES)]
        for values, record in zip(leading, records, strict=True)
    ]
    for name in (field.name for field in fields(records[0])):
        if name in NOT_IN_CSV or name in columns:
            continue
        values = [getattr(record, name) for record in records]
        keys = dict.fromkeys(key for value in values if isinstance(value, dict) for key in value)
        columns += [f"{name}.{key}" for key in keys] or [name]
        for row, value in zip(rows, values, strict=True):
            row += [(value or {}).get(key) for key in keys] if keys else [value]
    return columns, rows


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of numbers for a file such as `table2.csv`. Spreadsheets take no text in it for a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell for cell in row])
    return out.getvalue()
