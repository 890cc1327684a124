"""`python -m llama_ft.report DIR [DIR2]`: show the tables, pictures and page of a sweep or a plan, or compare two."""

import os
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from llama_ft import cli
from llama_ft.config import ReportConfig, TrackerKind, TrackerMode, UserError, path_of
from llama_ft.config.groups import ReportForm, UploadConfig
from llama_ft.records.plan import is_plan
from llama_ft.reporting.reports import SWEEP_FILES, records, report_plan, report_sweep
from llama_ft.reporting.results import Group
from llama_ft.tracking import track_sweep, tracker_of, upload_runs

USAGE = cli.Usage(
    "report",
    "Show the tables, pictures and page of a sweep, finished or not, or of a plan; or compare two sweeps, or a sweep"
    " and a plan, side by side.",
    "DIR [DIR2] [KEY=VALUE ...]",
    ReportConfig,
    (
        "outputs/table2",
        "outputs/table2 outputs/other",
        "outputs/table2 outputs/plan",
        "outputs/table2 form=course",
        "outputs/table2 tracker.upload=true",
    ),
)
OF_DASHBOARD = ("project", "entity", "group", "mode")  # the tracker's settings that a dashboard needs


def main() -> int:
    """Report on the folders given."""
    named = [text for text in sys.argv[1:] if "=" not in text or os.path.exists(text)]
    overrides = [text for text in sys.argv[1:] if text not in named]
    folders = [path_of(text) for text in named]
    config = cli.composed_config("report", overrides, ReportConfig)
    if len(folders) not in (1, 2) or any(str(folder).startswith("-") for folder in folders):
        raise UserError("give DIR, the folder of a sweep such as outputs/table2, or two to compare; --help says more")
    console = Console()
    plans = [folder for folder in folders if is_plan(folder)]
    check(config, folders, plans, overrides)
    if len(folders) == 2:
        from llama_ft.reporting.comparison_report import report_comparison  # matplotlib takes a second to import

        first, second = sorted(folders, key=is_plan)  # a plan comes second, in whichever order they were given
        report_comparison(first, second, console)
    elif plans:
        report_plan(folders[0], console, config.form is ReportForm.course)
    else:
        groups = report_sweep(folders[0], console, config.form is ReportForm.course)
        if config.tracker.upload:
            send(config, folders[0], groups, console)
        if config.tracker.dashboard:
            address = made_dashboard(config.tracker, folders[0], groups)
            console.print(f"Dashboard: {address}", highlight=False, soft_wrap=True)
    return 0


def check(config: ReportConfig, folders: list[Path], plans: list[Path], overrides: list[str]) -> None:
    """Raise a UserError if the folders do not suit the settings; warn of settings without effect."""
    tracker = config.tracker
    needs = [f"tracker.{key}=true" for key in ("upload", "dashboard") if getattr(tracker, key)]
    if tracker.dashboard and tracker.kind is not TrackerKind.wandb:
        raise UserError(f"tracker.dashboard=true is W&B's, and tracker={tracker.kind.name}: leave one of them out")
    if tracker.dashboard and tracker.mode is TrackerMode.offline:
        raise UserError("tracker.dashboard=true needs W&B online, and tracker.mode=offline: leave one of them out")
    if needs and (len(folders) == 2 or plans):
        raise UserError(f"{needs[0]} sends one sweep: give only its folder")
    if len(plans) == 2:
        raise UserError(f"{plans[0]} and {plans[1]} are plans: give a sweep and a plan, or two sweeps")
    if len(folders) == 2 and config.form is ReportForm.course:
        raise UserError("form=course is for one folder, of a sweep or of a plan")
    used = ("tracker=", *(f"tracker.{key}=" for key in ("dashboard", *OF_DASHBOARD))) if tracker.dashboard else ()
    idle = [text for text in overrides if text.startswith("tracker") and not text.startswith(used)]
    if idle and not tracker.upload:
        both = "tracker.upload=true" if tracker.dashboard else "tracker.upload=true or tracker.dashboard=true"
        print(f"{', '.join(idle)}: no effect without {both}", file=sys.stderr)


def made_dashboard(config: UploadConfig, folder: Path, groups: list[Group]) -> str:
    """Make the sweep's dashboard in W&B and return its address."""
    run_dirs = [row.folder for group in groups for row in group.rows]
    if [each.resolve() for each in run_dirs] == [folder.resolve()]:
        raise UserError(f"tracker.dashboard=true shows a sweep, and {folder} holds one run")
    try:
        from llama_ft.tracking.dashboard import save_dashboard
    except ModuleNotFoundError as error:
        package = "wandb-workspaces: pip install 'llama_ft[dashboard]'"
        raise UserError(f"tracker.dashboard=true needs the package {package}") from error
    return save_dashboard(tracker_of(config, run_dirs[0]), folder.resolve().name)


def send(config: ReportConfig, folder: Path, groups: list[Group], console: Console) -> None:
    """Send the runs to the tracker, and the sweep if the folder is a sweep's."""
    folder = folder.resolve()  # also if it was given as . or ..
    run_dirs = [row.folder.resolve() for group in groups for row in group.rows]
    is_sweep = run_dirs != [folder]
    log = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    tracker = upload_runs(config.tracker, run_dirs, folder.name if is_sweep else None, log)
    if is_sweep:
        problems: list[str] = []
        track_sweep(tracker, folder, records(groups), SWEEP_FILES, problems.append)
        if problems:
            raise UserError(problems[0])


if __name__ == "__main__":
    cli.run_command(main, USAGE)
