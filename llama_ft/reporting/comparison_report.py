"""The report of a comparison: printed, and as Markdown, numbers, a picture and a page in the second folder."""

from pathlib import Path
from typing import Any

from rich.console import Console

from llama_ft.config import UserError
from llama_ft.files import write_text
from llama_ft.records.metrics import read_metrics
from llama_ft.records.plan import PLAN_FILE, is_plan, read_plan_file
from llama_ft.reporting.comparison import COMPARED, SAME_SETTINGS, Comparison, compare_plan, compare_sweeps
from llama_ft.reporting.results import read_groups, value_of
from llama_ft.reporting.table import csv_text, markdown, print_notes, print_table

FILES = ("comparison.md", "comparison.csv", "comparison.png", "comparison.html")


def report_comparison(first: Path, second: Path, console: Console) -> None:
    """Print and write the comparison of a sweep with a second one, or with a plan, into the second folder.

    Raises:
        UserError: if a folder holds no results or plan, a file is damaged, there is nothing to compare, or the second
            folder cannot be written to.
    """
    groups = read_groups(first)
    if is_plan(second):
        comparisons, notes = compare_plan(groups, read_plan_file(second))
        refusal = f"{second / PLAN_FILE} predicts no run of {first}: {'; '.join(notes)}"
    else:
        comparisons, notes = compare_sweeps(groups, read_groups(second))
        refusal = f"{first} and {second} have no run of the same model, data and combination"
    if not comparisons:
        raise UserError(refusal)
    names = [f"{side}: {folder}" for side, folder in zip(comparisons[0].sides.names, (first, second), strict=True)]
    for comparison in comparisons:
        print_table(comparison.table, console)
        print_notes(comparison.settings_lines, console)
    console.print()
    print_notes(names + notes, console)
    try:
        write_files(comparisons, notes, names, second)
    except OSError as error:
        raise UserError(f"the comparison cannot be written into {second}: {error.strerror}") from error
    console.print(f"\nWritten: {', '.join(FILES)} in {second}", highlight=False, markup=False, soft_wrap=True)


def write_files(comparisons: list[Comparison], notes: list[str], names: list[str], folder: Path) -> None:
    """Write all files of a comparison; `names` are those of the sides."""
    from llama_ft.reporting.comparison_page import comparison_page  # matplotlib takes a second to import
    from llama_ft.reporting.figure import draw_panels, pair_panels

    metrics = {run_dir: read_metrics(run_dir) for each in comparisons for run_dir in (*each.a.folders, *each.b.folders)}
    panels = [pair_panels(each.a, each.b, names) for each in comparisons]
    titles, heights = [each.title for each in comparisons], [0.56 * len(each.pairs) for each in comparisons]
    write_text(folder / "comparison.md", comparison_markdown(comparisons, names + notes))
    write_text(folder / "comparison.csv", comparison_csv(comparisons))
    draw_panels(panels, titles, heights, folder / "comparison.png")
    write_text(folder / "comparison.html", comparison_page(comparisons, notes, names, metrics))


def comparison_markdown(comparisons: list[Comparison], notes: list[str]) -> str:
    """For `comparison.md`."""
    parts = [*(f"- {note}" for note in notes), ""]
    for each in comparisons:
        parts += [markdown(each.table), "Not the same:" if each.settings else SAME_SETTINGS, ""]
        parts += [*(f"- {line}" for line in each.settings_lines), ""] if each.settings else []
    return "\n".join(parts)


def comparison_csv(comparisons: list[Comparison]) -> str:
    """For `comparison.csv`: a row for each pair, numbers unrounded; a difference is a share, of the loss in itself."""
    sides, keys = comparisons[0].sides, [measure.key for measure in COMPARED]
    columns = ["combination", "variant", "model", "data", "device", "gpu", *(f"status.{side}" for side in sides.names)]
    columns += [f"{key}.{part}" for key in keys for part in (*sides.names, sides.difference)]
    rows: list[list[Any]] = []
    for each in comparisons:
        for a, b in each.pairs:
            known = [a.combination, each.a.variant, a.model, a.data, a.device, b.gpu, a.status, b.status]
            numbers = [(value_of(a, key), value_of(b, key), each.change(a, b, key)) for key in keys]
            rows.append([*known, *(number for three in numbers for number in three)])
    return csv_text(columns, rows)
