"""A sweep's report as one HTML page that needs nothing but itself."""

from pathlib import Path
from typing import Any

from llama_ft.records import CATEGORIES
from llama_ft.records.result import CONFIG_FILE
from llama_ft.reporting.curves import MAX_POINTS, run_charts
from llama_ft.reporting.figure import COLOURS, LIMIT_COLOUR, limit_in_picture, table2_panels
from llama_ft.reporting.markup import document, facts, head_row, legend, notes, pictures, row, table, text
from llama_ft.reporting.progress import ending
from llama_ft.reporting.results import Group, label
from llama_ft.reporting.table2 import MAIN, MARKS, Table, amount

ENDINGS = {"ok": "ok", "oom": "out of memory", "killed": "killed", "interrupted": "interrupted", "error": "failed"}
CURVES_NOTE = (
    f"Over the optimizer steps; of more than {MAX_POINTS}, the mean of each stretch, shaded from its least to its"
    " greatest. Memory in use: on CUDA what the allocator has given, on the CPU the whole process."
)

Metrics = dict[Path, list[dict[str, Any]]]


def sweep_page(folder: Path, groups: list[Group], tables: list[Table], metrics: Metrics) -> str:
    """For each group its table and picture, memory by category, and each run with all that is known of it.

    Args:
        folder: of the sweep.
        tables: of the groups, in their order.
        metrics: the steps of each run, by its folder.
    """
    name = folder.resolve().name
    body = [f'<h1>{text(name)}</h1>\n<p class="soft">Report of llama_ft · {text(_endings(groups))}</p>']
    for group, numbers in zip(groups, tables, strict=True):
        body += [f"<h2>{text(group.title)}</h2>", table2_of(numbers), pictures_of(group), notes(numbers.notes)]
        body += ["<h3>Memory at the peak, MiB</h3>", memory_table(group.results), "<h3>Runs</h3>"]
        runs = zip(group.results, group.folders, strict=True)
        body += [run_section(result, run_dir, folder, metrics[run_dir]) for result, run_dir in runs]
    return document(f"{name} · llama_ft", body)


def _endings(groups: list[Group]) -> str:
    statuses = [result["status"] for group in groups for result in group.results]
    counts = [f"{statuses.count(status)} {words}" for status, words in ENDINGS.items() if status in statuses]
    return f"{len(statuses)} {'run' if len(statuses) == 1 else 'runs'}: {', '.join(counts)}"


def table2_of(numbers: Table) -> str:
    """Table 2: a column for each combination."""
    head = [head_row(name, cells) for name, cells in numbers.techniques]
    body = []
    for name, cells in numbers.rows:
        kind = "main" if name.startswith(MAIN) else "sub" if name.startswith(" ") else ""
        body.append(row(name.strip(), cells, kind))
    kind = "many" if len(numbers.techniques[0][1]) > 8 else "named" if numbers.longest_name else ""
    return table(numbers.title, head, body, kind)


def pictures_of(group: Group) -> str:
    """Memory and runtime as bars, and what the colours are."""
    limit = limit_in_picture(group.results)
    limits = [(f"limit {limit:,} MiB", LIMIT_COLOUR, True)] if limit is not None else []
    return legend(category_colours() + limits) + pictures(table2_panels(group), ["peak memory by category", "runtime"])


def category_colours() -> list[tuple[str, str, bool]]:
    """The legend's entries for categories of memory."""
    return [(category.replace("_", " "), colour, False) for category, colour in COLOURS.items()]


def memory_table(results: list[dict[str, Any]]) -> str:
    """Each run's memory by category at the instant of its peak, and the instant."""
    names = [category.replace("_", " ") for category in CATEGORIES]
    rows = []
    for result in results:
        if result["status"] == "ok" and result["memory_mib"]:
            memory = [amount(result["memory_mib"][category]) for category in CATEGORIES]
            cells = [*memory, amount(sum(result["memory_mib"].values())), result["peak_phase"] or "–"]
        else:
            cells = [*["–"] * len(names), MARKS.get(result["status"], "–"), "–"]
        rows.append(row(label(result), cells))
    return table("Memory at the peak", [head_row("", [*names, "sum", "during"])], rows)


def run_section(result: dict[str, Any], run_dir: Path, folder: Path, metrics: list[dict[str, Any]]) -> str:
    """A run, folded: how it ended, its curves, and what is needed to repeat it."""
    kind = ' class="bad"' if result["status"] != "ok" else ""
    parts = [f"<summary><b>{text(label(result))}</b><span{kind}>{text(ending(result))}</span></summary>"]
    if metrics:
        parts.append(f'<div class="charts">{run_charts(metrics)}</div><p class="notes">{CURVES_NOTE}</p>')
    else:
        parts.append('<p class="soft">No optimizer step was finished.</p>')
    place = Path(folder.resolve().name) / run_dir.relative_to(
        folder
    )  # however the folder was named on the command line
    parts.append(facts(_facts(result, place.as_posix())))
    if result["breakdown"]:
        parts.append(f"<details><summary>Tensors at the peak</summary>{ledger_table(result['ledger'])}</details>")
    config = run_dir / CONFIG_FILE
    if config.is_file():
        content = text(config.read_text(encoding="utf-8", errors="replace"))
        parts.append(f"<details><summary>{CONFIG_FILE}</summary><pre>{content}</pre></details>")
    return f"<details>{''.join(parts)}</details>\n"


def _facts(result: dict[str, Any], place: str) -> list[tuple[str, str]]:
    """What the table does not hold: environment, command, and what was trained on what."""
    versions = ", ".join(f"{key} {value}" for key, value in (result["versions"] or {}).items() if value)
    given = [("Command", f"<code>{text(result['command'])}</code>"), ("Folder", f"<code>{text(place)}</code>")]
    if result["device"]:
        given.append(("Device", text(result["device"])))
    if versions:
        given.append(("Versions", text(versions)))
    if result["total_params"]:
        counts = f"{result['trainable_params']:,} of {result['total_params']:,} ({result['trainable_percent']:.3g} %)"
        given.append(("Trainable parameters", counts))
    if result["samples"]:
        given.append(("Trained on", f"{result['samples']:,} samples, {result['tokens'] or 0:,} tokens"))
    for name, key in (("Compute dtype", "compute_dtype"), ("Skipped steps", "skipped_steps")):
        if result[key]:
            given.append((name, text(result[key])))
    if result["resumed_at_step"]:
        given.append(("Resumed", f"at optimizer step {text(result['resumed_at_step'])}"))
    if result["config_hash"]:
        given.append(("Config hash", f"<code>{text(result['config_hash'])}</code>"))
    return given


def ledger_table(breakdown: list[dict[str, Any]]) -> str:
    """What the memory at the peak consists of, by category and dtype."""
    lines = sorted(breakdown, key=lambda line: (CATEGORIES.index(line["category"]), line["dtype"]))
    rows = []
    for line in lines:
        item = f" ({line['item']})" if line.get("item") else ""
        rows.append(
            row(
                line["category"].replace("_", " ") + item,
                [line["dtype"], "<0.01" if 0 < line["mb"] < 0.005 else amount(line["mb"])],
            )
        )
    return table("Tensors at the peak", [head_row("", ["dtype", "MiB"])], rows)
