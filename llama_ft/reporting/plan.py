"""A plan's files and its tables on the terminal."""

import json
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llama_ft.config import UserError
from llama_ft.files import write_text
from llama_ft.reporting.plan_file import PLAN_FILE, Plan, read_plan
from llama_ft.reporting.plan_tables import advice_title, csv_text, tables_of
from llama_ft.reporting.table2 import markdown, print_table

SHOWN = ("plan.md", "plan.csv", "plan.png", "plan.html")
FILES = (PLAN_FILE, *SHOWN)


def write_plan(plan: Plan, folder: Path) -> None:
    """Write all files of a plan.

    Raises:
        UserError: if one cannot be written.
    """
    try:
        write_text(folder / PLAN_FILE, json.dumps(plan, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise _not_written(folder, error) from error
    show(plan, folder)


def show(plan: Plan, folder: Path) -> None:
    """Write the files that follow from `plan.json`.

    Raises:
        UserError: if one cannot be written.
    """
    from llama_ft.reporting.plan_figure import draw_plan  # matplotlib takes a second to import
    from llama_ft.reporting.plan_page import plan_page

    try:
        write_text(folder / "plan.md", plan_markdown(plan))
        write_text(folder / "plan.csv", csv_text(plan))
        draw_plan(plan, folder / "plan.png")
        write_text(folder / "plan.html", plan_page(plan))
    except OSError as error:
        raise _not_written(folder, error) from error


def _not_written(folder: Path, error: OSError) -> UserError:
    return UserError(f"the plan cannot be written into {folder}: {error.strerror}")


def report_plan(folder: Path, console: Console) -> None:
    """Print a plan again from its `plan.json`, and write anew what follows from it.

    Raises:
        UserError: if the file is damaged, or the folder cannot be written to.
    """
    plan = read_plan(folder)
    show(plan, folder)
    print_plan(plan, console)
    console.print(f"\nWritten: {', '.join(SHOWN)} in {folder}", highlight=False, markup=False, soft_wrap=True)


def print_plan(plan: Plan, console: Console) -> None:
    """Print the tables, and the advice if it was asked for."""
    for table in tables_of(plan):
        print_table(table, console)
    if plan["advice"]:
        console.print(f"\n{advice_title(plan['advice'])}\n", style="bold", highlight=False, markup=False)
        for line in plan["advice"]["lines"]:
            console.print(Text(f"  {line}"), soft_wrap=not console.is_terminal)


def plan_markdown(plan: Plan) -> str:
    """For `plan.md`."""
    parts = [markdown(table) for table in tables_of(plan)]
    if plan["advice"]:
        parts += [f"### {advice_title(plan['advice'])}", "", *(f"- {line}" for line in plan["advice"]["lines"]), ""]
    return "\n".join([*parts, f"`{plan['command']}`", ""])
