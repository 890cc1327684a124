"""A sweep's report: the table on the terminal; in its folder the table as text and numbers, a picture, and a page."""

from pathlib import Path

from rich.console import Console

from llama_ft.config import UserError
from llama_ft.files import write_text
from llama_ft.records.metrics import read_metrics
from llama_ft.reporting.results import Group, read_groups
from llama_ft.reporting.table import csv_text, markdown, print_table
from llama_ft.reporting.table2 import records, table2

FILES = ("table2.md", "table2.csv", "table2.png", "report.html")


def report_sweep(folder: Path, console: Console) -> list[Group]:
    """Print and write the report, and return what it is about."""
    groups = read_groups(folder)
    metrics = {run_dir: read_metrics(run_dir) for group in groups for run_dir in group.folders}
    tables = [table2(group) for group in groups]
    for table in tables:
        print_table(table, console)
    from llama_ft.reporting.figure import draw_panels, group_panels  # matplotlib takes a second to import
    from llama_ft.reporting.page import sweep_page

    try:
        write_text(folder / "table2.md", "\n".join(markdown(table) for table in tables))
        write_text(folder / "table2.csv", csv_text(*records(groups)))
        panels, heights = [group_panels(group) for group in groups], [0.42 * len(group.results) for group in groups]
        draw_panels(panels, [group.title for group in groups], heights, folder / "table2.png", width_ratios=(3, 2))
        write_text(folder / "report.html", sweep_page(folder, groups, tables, metrics))
    except OSError as error:
        raise UserError(f"the report cannot be written into {folder}: {error.strerror}") from error
    console.print(f"\nWritten: {', '.join(FILES)} in {folder}", highlight=False, markup=False, soft_wrap=True)
    return groups
