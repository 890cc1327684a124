"""Self-contained pages from the templates in this folder: the page of a sweep."""

import base64
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llama_ft.config.techniques import combination_label
from llama_ft.records import CATEGORIES, shown_categories
from llama_ft.records.metrics import evaluations_of, read_metrics
from llama_ft.records.result import CONFIG_FILE, MemoryItem
from llama_ft.reporting.curves import MAX_POINTS, held_out_table, run_charts
from llama_ft.reporting.figure import COLORS, LIMIT_COLOR, group_panels, limit_in_picture, svg_panel
from llama_ft.reporting.pareto import front_panels
from llama_ft.reporting.progress import ending
from llama_ft.reporting.results import Group, value_of
from llama_ft.reporting.table import MAIN, MARKS, UNKNOWN, Rows, Table, amount, is_failure

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # not allowed in a page, not even escaped
CATEGORY_COLORS = {category.replace("_", " "): color for category, color in COLORS.items()}
ENDINGS = {"ok": "ok", "oom": "out of memory", "killed": "killed", "interrupted": "interrupted", "error": "failed"}
MAX_WITH_CURVES = 16  # rows of a table, of three repeats each; with more a page would take minutes and be of no use


def render(template: str, **values: Any) -> str:
    """Render a whole page; nothing in the values is taken for markup."""
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["base64"] = lambda content: base64.b64encode(content).decode()
    pages.globals |= {"MAIN": MAIN, "is_failure": is_failure, "LIMIT_COLOR": LIMIT_COLOR, "CONFIG_FILE": CONFIG_FILE}
    pages.globals |= {"combination_label": combination_label, "category_colors": CATEGORY_COLORS}
    pages.globals |= {"breakdown_table": breakdown_table, "versions_text": versions_text}
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", pages.get_template(template).render(values))


def versions_text(versions: dict[str, str | None]) -> str:
    """Names and versions, without missing ones."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def memory_table(group: Group) -> Table:
    """Each run's memory by category at its peak, with the phase; for a split run each process's too."""
    rows: Rows = []
    categories = shown_categories(value_of(result, "memory_mib") for result in group.results)

    def cells(memory: dict[str, float], phase: str | None) -> list[str]:
        parts = [amount(memory.get(category, 0.0)) for category in categories]
        return [*parts, amount(sum(memory.values())), phase or UNKNOWN]

    for result, label in zip(group.results, group.labels, strict=True):
        unknown = [*[UNKNOWN] * len(categories), MARKS.get(result.status, UNKNOWN), UNKNOWN]
        memory = value_of(result, "memory_mib")
        rows.append((label, cells(memory, result.peak_phase) if memory else unknown))
        rows += [
            (f"{label}, rank {rank}", cells(use.memory_mib, use.peak_phase)) for rank, use in enumerate(result.ranks)
        ]
    names = [category.replace("_", " ") for category in categories]
    return Table("Memory at the peak", [("", [*names, "sum", "during"])], rows, [])


def breakdown_table(breakdown: list[MemoryItem]) -> Table:
    """The tensors at the peak by category and dtype."""
    rows: Rows = []
    for part in sorted(breakdown, key=lambda part: (CATEGORIES.index(part.category), part.dtype)):
        name = part.category.replace("_", " ") + (f" ({part.item})" if part.item else "")
        rows.append((name, [part.dtype, "<0.01" if 0 < part.mib < 0.005 else amount(part.mib)]))
    return Table("Tensors at the peak", [("", ["dtype", "MiB"])], rows, [])


def sweep_page(folder: Path, groups: list[Group], tables: list[Table]) -> str:
    """For each group its table and picture, memory by category, and all details of each run."""
    title = folder.resolve().name
    statuses = [run.result.status for group in groups for _, run in group.runs]
    counts = [f"{statuses.count(status)} {words}" for status, words in ENDINGS.items() if status in statuses]
    endings = f"{len(statuses)} {'run' if len(statuses) == 1 else 'runs'}: {', '.join(counts)}"
    sections: list[dict[str, Any]] = []
    for group, table in zip(groups, tables, strict=True):
        panels = [svg_panel(draw, 5.2, 0.31 * len(group.results) + 0.7) for draw in group_panels(group)]
        bars = dict(zip(("peak memory by category", "runtime"), panels, strict=True))
        bars |= {name: svg_panel(draw, 5.2, 3.0) for name, draw in front_panels(group).items()}
        limit = limit_in_picture(group)
        has_curves = len(group.results) <= MAX_WITH_CURVES and len(group.runs) <= 3 * MAX_WITH_CURVES
        runs = []
        for number, each in group.runs:
            result, run_dir, label = each.result, each.folder, each.named(group.labels[number])
            shown_dir = Path(title) / run_dir.relative_to(folder)  # however the folder was named on the command line
            config, metrics = run_dir / CONFIG_FILE, read_metrics(run_dir) if has_curves else []
            run = {"result": result, "label": label, "folder": shown_dir.as_posix(), "ending": ending(result)}
            run["charts"] = run_charts(metrics) if has_curves else None
            run["held_out"] = held_out_table(evaluations_of(metrics))
            run["config"] = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None
            runs.append(run)
        section = {"table": table, "bars": bars, "limit": f"limit {limit:,} MiB" if limit is not None else ""}
        sections.append({**section, "memory": memory_table(group), "runs": runs})
    return render("sweep.html.jinja", title=title, endings=endings, sections=sections, max_points=MAX_POINTS)
