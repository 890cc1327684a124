"""A sweep's report as one HTML page that needs nothing but itself."""

from pathlib import Path
from typing import Any

from llama_ft.records.metrics import StepMetrics
from llama_ft.records.result import CONFIG_FILE, Result
from llama_ft.reporting.curves import MAX_POINTS, run_charts
from llama_ft.reporting.figure import group_panels, limit_in_picture, svg_panel
from llama_ft.reporting.markup import memory_table, render
from llama_ft.reporting.progress import ending
from llama_ft.reporting.results import Group
from llama_ft.reporting.table import Table

ENDINGS = {"ok": "ok", "oom": "out of memory", "killed": "killed", "interrupted": "interrupted", "error": "failed"}

Metrics = dict[Path, list[StepMetrics]]  # the steps of each run, by its folder


def sweep_page(folder: Path, groups: list[Group], tables: list[Table], metrics: Metrics) -> str:
    """For each group its table and picture, memory by category, and each run with all that is known of it."""
    title = folder.resolve().name
    statuses = [result.status for group in groups for result in group.results]
    counts = [f"{statuses.count(status)} {words}" for status, words in ENDINGS.items() if status in statuses]
    endings = f"{len(statuses)} {'run' if len(statuses) == 1 else 'runs'}: {', '.join(counts)}"
    sections: list[dict[str, Any]] = []
    for group, table in zip(groups, tables, strict=True):
        panels = [svg_panel(draw, 5.2, 0.31 * len(group.results) + 0.7) for draw in group_panels(group)]
        bars = dict(zip(("peak memory by category", "runtime"), panels, strict=True))
        limit = limit_in_picture(group)
        runs = []
        for result, run_dir in zip(group.results, group.folders, strict=True):
            shown_dir = Path(title) / run_dir.relative_to(folder)  # however the folder was named on the command line
            runs.append(_run(result, run_dir, shown_dir.as_posix(), metrics[run_dir]))
        section = {"table": table, "bars": bars, "limit": f"limit {limit:,} MiB" if limit is not None else ""}
        sections.append({**section, "memory": memory_table(group.results), "runs": runs})
    return render("sweep.html.jinja", title=title, endings=endings, sections=sections, max_points=MAX_POINTS)


def _run(result: Result, run_dir: Path, shown_dir: str, metrics: list[StepMetrics]) -> dict[str, Any]:
    file = run_dir / CONFIG_FILE
    config = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    charts = run_charts(metrics) if metrics else {}
    return {"result": result, "folder": shown_dir, "ending": ending(result), "charts": charts, "config": config}
