"""What `data` finds, on a terminal and as Markdown."""

import re
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from llama_ft.records.data import DataReport, Example, Places
from llama_ft.reporting.table import Table, markdown, print_table

BAR_WIDTH = 40  # characters of the longest
MAX_SHOWN = 2000  # characters of a part of an example; data.json has all
TRAINED = "bold green"


def data_tables(report: DataReport) -> list[Table]:
    """The numbers, and the histogram."""
    lengths = report.lengths
    rows = {
        "  the same as an earlier one": f"{report.duplicates.records:,}",
        "  with an empty answer": f"{report.empty_answers.records:,}",
        "Tokens of a record": "",
        "  shortest": f"{lengths.shortest:,}",
        "  median": f"{lengths.median:,g}",
        "  mean": f"{lengths.mean:,.1f}",
        "  90 % have at most": f"{lengths.p90:,}",
        "  99 % have at most": f"{lengths.p99:,}",
        "  longest": f"{lengths.longest:,}",
        f"  records of more than {report.max_length:,}": f"{report.too_long.records:,}",
        "Tokens of an epoch": f"{report.tokens:,}",
        "  trained on": f"{report.trained_tokens / report.tokens:.1%}" if report.tokens else "–",
    }
    head = [("Records", [f"{report.records:,}"])]
    numbers = Table(report.data, head, [(name, [cell]) for name, cell in rows.items()], _notes(report))
    most = max(bin.records for bin in report.histogram)
    labels = [f"{bin.first:,}" + (" or more" if bin.last is None else f"–{bin.last:,}") for bin in report.histogram]
    bars = [
        (f"{label:<{max(map(len, labels))}}  {'█' * round(BAR_WIDTH * bin.records / most)}", [f"{bin.records:,}"])
        for label, bin in zip(labels, report.histogram, strict=True)
    ]
    return [numbers, Table("Lengths", [("Tokens", ["Records"])], bars, [])]


def _notes(report: DataReport) -> list[str]:
    on_long = report.settings["data"]["on_long"]
    ends = ", ".join(report.ends)
    notes = [
        f"Of {report.file}, in the template {report.template}; texts end at {ends}; tokenizer={report.tokenizer}.",
        "Special tokens count. A record's answer is trained on, and what ends it.",
    ]
    if report.too_long.records:
        what = f"{report.truncated:,} cut, {report.dropped:,} left out" if on_long != "error" else "a run stops"
        reason = f"More than {report.max_length:,} tokens, data.on_long={on_long}, {what}"
        notes.append(_named(reason, report.too_long))
    if report.duplicates.records:
        notes.append(f"The same twice: first {' and '.join(report.duplicates.first)}.")
    if report.empty_answers.records:
        notes.append(_named("Empty answers", report.empty_answers))
    return notes + [f"Bad records skipped: {report.skipped:,}."] * bool(report.skipped)


def _named(what: str, places: Places) -> str:
    return f"{what}: {', '.join(places.first)}{' …' if places.records > len(places.first) else ''}."


def _heading(example: Example) -> str:
    return f"{example.name}: {example.where}, {example.tokens:,} tokens; trained on"


def _shortened(text: str) -> str:
    """A text without the middle of it, if it is long."""
    left_out = len(text) - MAX_SHOWN
    if left_out <= 0:
        return text
    return f"{text[: MAX_SHOWN // 2]} [… {left_out:,} characters …] {text[-MAX_SHOWN // 2 :]}"


def _marked(example: Example) -> str:
    parts = ((_shortened(part.text), part.is_trained_on) for part in example.segments)
    return "".join(f"⟦{text}⟧" if is_on else text for text, is_on in parts)


def print_data(report: DataReport, console: Console) -> None:
    """Print tables and examples: what is trained on in colour, or between marks where there is none."""
    for table in data_tables(report):
        print_table(table, console)
    for example in report.examples:
        in_colour = console.is_terminal and console.color_system is not None
        parts = [(_shortened(part.text), TRAINED if part.is_trained_on else "") for part in example.segments]
        how = "is in colour" if in_colour else "is between ⟦ and ⟧"
        console.print(f"\n{_heading(example)} {how}\n", style="bold", highlight=False, markup=False, soft_wrap=True)
        console.print(Text.assemble(*parts) if in_colour else Text(_marked(example)), soft_wrap=True)


def data_markdown(report: DataReport) -> str:
    """The same as Markdown."""
    return "\n".join([*map(markdown, data_tables(report)), *_fenced(report.examples)])


def _fenced(examples: Iterable[Example]) -> Iterable[str]:
    for example in examples:
        text = _marked(example)
        fence = "`" * (1 + max(2, *(len(run) for run in re.findall("`+", text) or [""])))
        yield f"{_heading(example)} is between ⟦ and ⟧\n\n{fence}text\n{text}\n{fence}\n"
