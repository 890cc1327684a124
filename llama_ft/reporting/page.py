"""A sweep's report as one HTML page that needs nothing but itself."""

from collections.abc import Sequence
from pathlib import Path

from llama_ft.config.techniques import combination_label
from llama_ft.records import CATEGORIES
from llama_ft.records.metrics import StepMetrics
from llama_ft.records.result import CONFIG_FILE, MemoryItem, Result
from llama_ft.reporting.curves import MAX_POINTS, run_charts
from llama_ft.reporting.figure import COLOURS, LIMIT_COLOUR, group_panels, limit_in_picture, svg_panel
from llama_ft.reporting.markup import document, facts, html_table, legend, notes, pictures, text
from llama_ft.reporting.progress import ending
from llama_ft.reporting.results import Group, value_of
from llama_ft.reporting.table import MARKS, UNKNOWN, Rows, Table, amount

ENDINGS = {"ok": "ok", "oom": "out of memory", "killed": "killed", "interrupted": "interrupted", "error": "failed"}
CURVES_NOTE = (
    f"Over the optimizer steps; of more than {MAX_POINTS}, the mean of each stretch, shaded from its minimum to its"
    " maximum. Memory in use: on CUDA what the allocator has given, on the CPU the whole process."
)

Metrics = dict[Path, list[StepMetrics]]  # the steps of each run, by its folder


def sweep_page(folder: Path, groups: list[Group], tables: list[Table], metrics: Metrics) -> str:
    """For each group its table and picture, memory by category, and each run with all that is known of it.

    Args:
        folder: of the sweep.
        tables: of the groups, in their order.
    """
    name = folder.resolve().name
    body = [f'<h1>{text(name)}</h1>\n<p class="soft">Report of llama_ft · {text(_endings(groups))}</p>']
    for group, numbers in zip(groups, tables, strict=True):
        body += [f"<h2>{text(group.title)}</h2>", html_table(numbers), _pictures(group), notes(numbers.notes)]
        body += ["<h3>Memory at the peak, MiB</h3>", memory_table(group.results), "<h3>Runs</h3>"]
        for result, run_dir in zip(group.results, group.folders, strict=True):
            shown_dir = Path(name) / run_dir.relative_to(folder)  # however the folder was named on the command line
            body.append(_run_section(result, run_dir, shown_dir.as_posix(), metrics[run_dir]))
    return document(f"{name} · llama_ft", body)


def _endings(groups: list[Group]) -> str:
    statuses = [result.status for group in groups for result in group.results]
    counts = [f"{statuses.count(status)} {words}" for status, words in ENDINGS.items() if status in statuses]
    return f"{len(statuses)} {'run' if len(statuses) == 1 else 'runs'}: {', '.join(counts)}"


def _pictures(group: Group) -> str:
    """Memory and runtime as bars, and what the colours are."""
    limit = limit_in_picture(group)
    limits = [(f"limit {limit:,} MiB", LIMIT_COLOUR, True)] if limit is not None else []
    panels = [svg_panel(draw, 5.2, 0.31 * len(group.results) + 0.7) for draw in group_panels(group)]
    return legend(category_colours() + limits) + pictures(panels, ["peak memory by category", "runtime"])


def category_colours() -> list[tuple[str, str, bool]]:
    """The legend's entries for categories of memory."""
    return [(category.replace("_", " "), colour, False) for category, colour in COLOURS.items()]


def memory_table(results: Sequence[Result]) -> str:
    """Each run's memory by category at the instant of its peak, and the instant."""
    names = [category.replace("_", " ") for category in CATEGORIES]
    rows: Rows = []
    for result in results:
        cells = [*[UNKNOWN] * len(names), MARKS.get(result.status, UNKNOWN), UNKNOWN]
        if memory := value_of(result, "memory_mib"):
            parts = [amount(memory.get(category, 0.0)) for category in CATEGORIES]
            cells = [*parts, amount(sum(memory.values())), result.peak_phase or UNKNOWN]
        rows.append((combination_label(result.optim), cells))
    return html_table(Table("Memory at the peak", [("", [*names, "sum", "during"])], rows, []))


def _run_section(result: Result, run_dir: Path, shown_dir: str, metrics: list[StepMetrics]) -> str:
    """A run, folded: how it ended, its curves, and what is needed to repeat it."""
    kind = ' class="bad"' if result.status != "ok" else ""
    name = combination_label(result.optim)
    parts = [f"<summary><b>{text(name)}</b><span{kind}>{text(ending(result))}</span></summary>"]
    if metrics:
        parts.append(f'{run_charts(metrics)}<p class="notes">{CURVES_NOTE}</p>')
    else:
        parts.append('<p class="soft">No optimizer step was finished.</p>')
    parts.append(facts(_facts(result, shown_dir)))
    if result.breakdown:
        parts.append(f"<details><summary>Tensors at the peak</summary>{breakdown_table(result.breakdown)}</details>")
    config = run_dir / CONFIG_FILE
    if config.is_file():
        content = text(config.read_text(encoding="utf-8", errors="replace"))
        parts.append(f"<details><summary>{CONFIG_FILE}</summary><pre>{content}</pre></details>")
    return f"<details>{''.join(parts)}</details>\n"


def _facts(result: Result, shown_dir: str) -> list[tuple[str, str]]:
    """What the table does not hold: environment, command, and what was trained on what."""
    versions = ", ".join(f"{key} {version}" for key, version in (result.versions or {}).items() if version)
    percent, resumed_at = result.trainable_percent or 0.0, result.resumed_at_step
    counts = f"{result.trainable_params or 0:,} of {result.total_params or 0:,} ({percent:.3g} %)"
    known = {
        "Command": f"<code>{text(result.command)}</code>",
        "Folder": f"<code>{text(shown_dir)}</code>",
        "Device": result.device and text(result.device),
        "Versions": text(versions),
        "Trainable parameters": result.total_params and counts,
        "Trained on": result.samples and f"{result.samples:,} samples, {result.tokens or 0:,} tokens",
        "Compute dtype": result.compute_dtype and text(result.compute_dtype),
        "Skipped steps": result.skipped_steps and text(result.skipped_steps),
        "Resumed": resumed_at and f"at optimizer step {resumed_at}",
        "Config hash": result.config_hash and f"<code>{text(result.config_hash)}</code>",
    }
    return [(name, str(value)) for name, value in known.items() if value]


def breakdown_table(breakdown: list[MemoryItem]) -> str:
    """What the memory at the peak consists of, by category and dtype."""
    rows: Rows = []
    for part in sorted(breakdown, key=lambda part: (CATEGORIES.index(part.category), part.dtype)):
        name = part.category.replace("_", " ") + (f" ({part.item})" if part.item else "")
        rows.append((name, [part.dtype, "<0.01" if 0 < part.mib < 0.005 else amount(part.mib)]))
    return html_table(Table("Tensors at the peak", [("", ["dtype", "MiB"])], rows, []))
