"""Two sweeps side by side: printed, and as Markdown, a picture and a page in the second's folder."""

from pathlib import Path

from rich.console import Console

from llama_ft.config import UserError
from llama_ft.files import write_text
from llama_ft.records.metrics import read_metrics
from llama_ft.reporting.pairs import Comparison, compared, match
from llama_ft.reporting.results import read_groups
from llama_ft.reporting.settings import SAME_SETTINGS
from llama_ft.reporting.table2 import markdown, print_notes, print_table

FILES = ("comparison.md", "comparison.html", "comparison.png")


def report_comparison(first: Path, second: Path, console: Console) -> None:
    """Print and write the comparison, into the second folder.

    Raises:
        UserError: if a folder holds no results, one is damaged, they have no combination in common, or the second
            cannot be written to.
    """
    matched, notes = match(read_groups(first), read_groups(second))
    if not matched:
        raise UserError(f"{first} and {second} have no run of the same model, data and combination")
    comparisons = [compared(a, b) for a, b in matched]
    metrics = {run_dir: read_metrics(run_dir) for pair in matched for group in pair for run_dir in group.folders}
    names = (str(first), str(second))
    folders = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
    for each in comparisons:
        print_table(each.table, console)
        print_notes(each.settings_lines, console)
    console.print()
    print_notes(folders + notes, console)
    from llama_ft.reporting.comparison_page import comparison_page
    from llama_ft.reporting.figure import comparison_panels, draw_comparison

    panels = [comparison_panels(pair) for pair in matched]
    try:
        write_text(second / FILES[0], comparison_markdown(comparisons, folders + notes))
        write_text(second / FILES[1], comparison_page(comparisons, notes, names, panels, metrics))
        draw_comparison(matched, [each.table.title for each in comparisons], names, second / FILES[2])
    except OSError as error:
        raise UserError(f"the comparison cannot be written into {second}: {error.strerror}") from error
    console.print(f"\nWritten: {', '.join(FILES)} in {second}", highlight=False, markup=False, soft_wrap=True)


def comparison_markdown(comparisons: list[Comparison], notes: list[str]) -> str:
    """For `comparison.md`."""
    parts = [*(f"- {note}" for note in notes), ""]
    for each in comparisons:
        parts += [markdown(each.table), "Not the same:" if each.settings else SAME_SETTINGS, ""]
        parts += [*(f"- {line}" for line in each.settings_lines), ""] if each.settings else []
    return "\n".join(parts)
