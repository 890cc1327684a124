"""The reports of a sweep and of a plan: printed tables, and files with tables, numbers, a picture and a page."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from llama_ft.config import SEED, UserError
from llama_ft.files import check_replaceable, explained, write_text
from llama_ft.records import read_record, write_record
from llama_ft.records.plan import PLAN_FILE, Plan
from llama_ft.reporting.course import course_tables, latex, planned_course_tables
from llama_ft.reporting.plan_tables import tables_of
from llama_ft.reporting.reading import read_groups
from llama_ft.reporting.results import DEVICE, TECHNIQUES_COLUMN, Group
from llama_ft.reporting.run_table import gathered, run_table
from llama_ft.reporting.settings import as_typed
from llama_ft.reporting.table import Table, csv_text, markdown, plain_text, print_table, record_table
from llama_ft.reporting.table2 import table2

LOSSES_FILE, PARETO_FILE = "losses.png", "pareto.png"  # if runs have held-out losses
SWEEP_FILES = ("table2.csv", "table2.md", "table2.png", "report.html", LOSSES_FILE, PARETO_FILE)
COURSE_FILES = ("course.md", "course.tex")  # with form=course
COURSE_MARK = "Table 1 · "  # a title in the first
SWEEP_MARK = "combination"  # a column of the first
PLAN_REPORT = ("plan.md", "plan.csv", "plan.png", "plan.html")  # made from plan.json
PLAN_FILES = (PLAN_FILE, *PLAN_REPORT)


def report_sweep(folder: Path, console: Console, is_course: bool = False) -> list[Group]:
    """Print and write the report, with `is_course` also the course's tables; return the groups of runs."""
    groups = gathered(read_groups(folder))
    check_replaceable(folder, SWEEP_FILES, SWEEP_MARK)
    for_course = sweep_course_tables(folder, groups) if is_course else []
    tables = [run_table(group) if group.settings else table2(group) for group in groups]
    for table in tables:
        print_table(table, console)
    from llama_ft.reporting.curves import draw_losses  # matplotlib takes a second to import
    from llama_ft.reporting.figure import draw_panels, group_panels
    from llama_ft.reporting.page import sweep_page
    from llama_ft.reporting.pareto import draw_fronts

    page = sweep_page(folder, groups, tables)  # before a file is written: it reads files that may be damaged
    with explained(f"the report cannot be written into {folder}"):
        write_text(folder / "table2.csv", csv_text(*records(groups)))
        write_text(folder / "table2.md", "\n".join(markdown(table) for table in tables))
        panels, heights = [group_panels(group) for group in groups], [0.42 * len(group.results) for group in groups]
        draw_panels(panels, [group.title for group in groups], heights, folder / "table2.png", width_ratios=(3, 2))
        write_text(folder / "report.html", page)
        draw_losses(groups, folder / LOSSES_FILE)
        draw_fronts(groups, folder / PARETO_FILE)
        course = write_course(folder, for_course)
    written = ", ".join([*(name for name in SWEEP_FILES if (folder / name).exists()), *course])
    console.print(f"\nWritten: {written} in {folder}", highlight=False, markup=False, soft_wrap=True)
    return groups


def records(groups: list[Group]) -> tuple[list[str], list[list[Any]]]:
    """Columns, and a row for each run, including repeats, numbers unrounded."""
    varied = dict.fromkeys(key for group in groups for settings in group.settings for key in settings)
    keys = [key for key in varied if key not in (TECHNIQUES_COLUMN, DEVICE)]
    keys += [SEED] if SEED not in keys and any(group.seeds for group in groups) else []
    leading, results = [], []
    for group in groups:
        for number, run in group.runs:
            known = group.settings[number] if group.settings else {}
            known = known | ({} if run.seed is None else {SEED: str(run.seed)})
            variant = run.folder.name.partition(",")[2] if group.settings else group.variant
            values = {key: known.get(key, "") for key in keys}
            leading.append({"combination": run.result.combination, "variant": variant} | values)
            results.append(run.result)
    return record_table(results, leading)


def sweep_course_tables(folder: Path, groups: list[Group]) -> list[Table]:
    """The course's tables of each sweep over techniques only; a UserError if there is none, or no place for them."""
    check_replaceable(folder, COURSE_FILES, COURSE_MARK)
    tables = [table for group in groups if not group.settings for table in course_tables(group)]
    if not tables:
        raise UserError(f"form=course: the runs in {folder} differ in other settings than techniques")
    return tables


def write_course(folder: Path, tables: list[Table]) -> list[str]:
    """Write the course's tables, if there are any, as Markdown and LaTeX, and return the files' names."""
    for name, form in zip(COURSE_FILES, (markdown, latex), strict=True):
        if tables:
            write_text(folder / name, "\n".join(map(form, tables)))
    return list(COURSE_FILES) if tables else []


def report_plan(folder: Path, console: Console, is_course: bool = False) -> None:
    """Print a plan again from its `plan.json` and rewrite its report, with `is_course` also the course's tables."""
    plan = read_record(Plan, folder / PLAN_FILE)
    for_course = planned_course_tables(plan) if is_course else []
    if is_course:
        check_replaceable(folder, COURSE_FILES, COURSE_MARK)
    write_plan(plan, folder, with_json=False)
    print_plan(plan, console)
    with explained(f"the course's tables cannot be written into {folder}"):
        written = ", ".join([*PLAN_REPORT, *write_course(folder, for_course)])
    console.print(f"\nWritten: {written} in {folder}", highlight=False, markup=False, soft_wrap=True)


def write_plan(plan: Plan, folder: Path, with_json: bool = True) -> None:
    """Write the files of a plan; with `with_json=False` only those made from `plan.json`."""
    from llama_ft.reporting.plan_page import draw_plan, plan_page  # matplotlib takes a second to import

    text = [markdown(table) for table in tables_of(plan)]
    if plan.advice:
        lines = [f"- {plain_text(line)}" for line in plan.advice.lines]
        text += [f"### {plain_text(plan.advice.title)}", "", *lines, ""]
    with explained(f"the plan cannot be written into {folder}"):
        if with_json:
            write_record(plan, folder / PLAN_FILE)
        write_text(folder / "plan.md", "\n".join([*text, f"`{plan.command}`", ""]))
        subject = {"model": plan.model, "data": plan.data.name}
        leading = [
            subject | {"combination": row.combination} | {key: as_typed(own) for key, own in row.settings.items()}
            for row in plan.rows
        ]
        write_text(folder / "plan.csv", csv_text(*record_table(plan.rows, leading)))
        draw_plan(plan, folder / "plan.png")
        write_text(folder / "plan.html", plan_page(plan))


def print_plan(plan: Plan, console: Console) -> None:
    """Print the tables, and the advice if it was asked for."""
    for table in tables_of(plan):
        print_table(table, console)
    if plan.advice:
        console.print(f"\n{plan.advice.title}\n", style="bold", highlight=False, markup=False)
        for line in plan.advice.lines:
            console.print(Text(f"  {line}"), soft_wrap=not console.is_terminal)
