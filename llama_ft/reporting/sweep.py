"""A sweep's report: the table on the terminal; in its folder the table as text and numbers, a picture, and a page."""

from pathlib import Path

from rich.console import Console

from llama_ft.config import UserError
from llama_ft.files import write_text
from llama_ft.reporting.results import Group, read_groups
from llama_ft.reporting.table2 import csv_text, markdown, table2, terminal

FILES = ("table2.md", "table2.csv", "table2.png", "report.html")


def report_sweep(folder: Path, console: Console) -> list[Group]:
    """Print and write the report, and return what it is about.

    Raises:
        UserError: if the folder holds no results or cannot be written to.
    """
    groups = read_groups(folder)
    tables = [table2(group) for group in groups]
    for table in tables:
        console.print(f"\n{table.title}\n", style="bold", highlight=False, markup=False, soft_wrap=True)
        for view in terminal(table, console.width):
            console.print(view)
            console.print()
        for note in table.notes:
            console.print(f"  {note}", style="dim", highlight=False, markup=False, soft_wrap=True)
    from llama_ft.reporting.figure import draw_table2  # matplotlib takes a second to import
    from llama_ft.reporting.page import sweep_page

    try:
        write_text(folder / "table2.md", "\n".join(markdown(table) for table in tables))
        write_text(folder / "table2.csv", csv_text(groups))
        draw_table2(groups, folder / "table2.png")
        page = sweep_page(folder.absolute().name, groups, tables, folder / "table2.png")
        write_text(folder / "report.html", page)
    except OSError as error:
        raise UserError(f"the report cannot be written into {folder}: {error.strerror}") from error
    console.print(f"\nWritten: {', '.join(FILES)} in {folder}", highlight=False, markup=False, soft_wrap=True)
    return groups
