"""The report of `data`, on a terminal and as Markdown."""

import re

from rich.console import Console
from rich.text import Text

from llama_ft.records.data import DataReport, Example, Places
from llama_ft.reporting.table import Table, markdown, print_table

BAR_WIDTH = 40  # characters of the longest
MAX_SHOWN = 2000  # characters of a part of an example; data.json has all
MARKED = "between ⟦ and ⟧"
LABELS = {"p90": "90 % have at most", "p99": "99 % have at most"}


def data_tables(report: DataReport) -> list[Table]:
    """The numbers, and the histogram."""
    rows = {
        "  the same as an earlier one": f"{report.duplicates.records:,}",
        "  with an empty answer": f"{report.empty_answers.records:,}",
        "Tokens of a record": "",
        **{f"  {LABELS.get(name, name)}": f"{value:,.1f}".removesuffix(".0") for name, value in report.lengths.items()},
        f"  records of more than {report.max_length:,}": f"{report.too_long.records:,}",
        "Tokens of an epoch": f"{report.tokens:,}",
        "  trained on": f"{report.trained_tokens / report.tokens:.1%}" if report.tokens else "–",
    }
    head = [("Records", [f"{report.records:,}"])]
    most, width = max(report.histogram.values()), max(map(len, report.histogram))
    bars = [
        (f"{name:<{width}}  {'█' * round(BAR_WIDTH * count / most)}", [f"{count:,}"])
        for name, count in report.histogram.items()
    ]
    numbers = Table(report.data, head, [(name, [cell]) for name, cell in rows.items()], _notes(report))
    return [numbers, Table("Lengths", [("Tokens", ["Records"])], bars, [])]


def _notes(report: DataReport) -> list[str]:
    on_long, ends = report.settings["data"]["on_long"], ", ".join(report.ends)
    became = f"{report.truncated:,} cut, {report.dropped:,} left out" if on_long != "error" else "a run stops"
    return [
        f"Template: {report.template}; texts end at {ends}; tokenizer={report.tokenizer}.",
        *_named(f"More than {report.max_length:,} tokens, data.on_long={on_long}, {became}", report.too_long),
        *_named("Duplicates", report.duplicates),
        *_named("Empty answers", report.empty_answers),
        *([f"Bad records skipped: {report.skipped:,}."] if report.skipped else []),
    ]


def _named(what: str, places: Places) -> list[str]:
    return [f"{what}: first {', '.join(places.first)}."] if places.records else []


def _title(example: Example, how: str) -> str:
    return f"{example.name}: {example.where}, {example.tokens:,} tokens; trained parts are {how}"


def _shown(text: str) -> str:
    half, left_out = MAX_SHOWN // 2, len(text) - MAX_SHOWN
    return f"{text[:half]} [… {left_out:,} characters …] {text[-half:]}" if left_out > 0 else text


def _marked(example: Example) -> str:
    return "".join(f"⟦{_shown(text)}⟧" if is_trained_on else _shown(text) for text, is_trained_on in example.parts)


def print_data(report: DataReport, console: Console) -> None:
    """Print tables and examples: trained parts in color, or between marks without colors."""
    for table in data_tables(report):
        print_table(table, console)
    in_color = console.is_terminal and console.color_system is not None
    for example in report.examples:
        title = _title(example, "in color" if in_color else MARKED)
        console.print(f"\n{title}\n", style="bold", highlight=False, markup=False, soft_wrap=True)
        colored = ((_shown(text), "bold green" if is_trained_on else "") for text, is_trained_on in example.parts)
        console.print(Text.assemble(*colored) if in_color else Text(_marked(example)), soft_wrap=True)


def data_markdown(report: DataReport) -> str:
    """The same as Markdown."""
    blocks = [markdown(table) for table in data_tables(report)]
    for example in report.examples:
        text = _marked(example)
        fence = "`" * (1 + max(2, *map(len, ["", *re.findall("`+", text)])))
        blocks.append(f"{_title(example, MARKED)}\n\n{fence}text\n{text}\n{fence}\n")
    return "\n".join(blocks)
