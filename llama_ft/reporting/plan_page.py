"""A plan as one HTML page that needs nothing but itself, to be sent to whom it concerns."""

from typing import Any

from llama_ft.config.techniques import combination_label
from llama_ft.records.plan import Advice, Plan, PlanRow
from llama_ft.reporting.figure import LIMIT_COLOUR, RESERVED_COLOUR, UNUSED, limit_in_picture
from llama_ft.reporting.markup import document, facts, html_table, legend, notes, pictures, text
from llama_ft.reporting.page import breakdown_table, category_colours, memory_table
from llama_ft.reporting.plan_figure import USABLE, heat_map_picture, panel_pictures, timeline_picture
from llama_ft.reporting.plan_tables import advice_title, cards, tables_of, title
from llama_ft.reporting.results import Group, baseline_of, planned_group
from llama_ft.reporting.settings import flat
from llama_ft.reporting.table import Table

LARGE, SMALL = (5.2, 3.2), (5.2, 2.4)  # inches of a timeline
TIMELINE_NOTE = (
    "Tensors over one optimizer step, from its first allocation to its last; of several micro-batches, the"
    " last one. The step starts with parameters and optimizer state; activations grow in the forward pass and go in the"
    " backward pass, which leaves gradients."
)


def plan_page(plan: Plan) -> str:
    """What was planned; advice; Table 2 with its pictures; memory over a step; Table 1; the tensors at each peak."""
    tables = tables_of(plan)
    first, rows = planned_group(plan, plan.gpus[0]), plan.rows_on(plan.gpus[0]["name"])
    body = [f"<h1>{text(plan.model)} on {text(cards(plan))}</h1>"]
    body += ['<p class="soft">Plan of llama_ft: nothing was run</p>', facts(_facts(plan)), *_advice(plan.advice)]
    of_table1 = [tables.pop()] if plan.table1 else []
    body += [part for table in tables for part in _section(table)]
    body += ["<h2>Memory by category</h2>", *_bars(plan)]
    body += _timelines(rows, first.memory_limit_mib)
    body += [part for table in of_table1 for part in _section(table)]
    body += [f"<h2>Memory at the peak, MiB: {text(plan.gpus[0]['name'])}</h2>", memory_table(first.results)]
    body += [_breakdown(row) for row in rows if row.breakdown]
    return document(f"{title(plan)} · llama_ft", body)


def _facts(plan: Plan) -> list[tuple[str, str]]:
    data, training = plan.data, plan.training
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items() if version)
    samples = f"{data.samples:,} samples, {data.tokens:,} tokens, the longest {data.longest:,}"
    techniques = ", ".join(f"{name}={_value(value)}" for name, value in flat(plan.techniques).items())
    return [
        ("Command", f"<code>{text(plan.command)}</code>"),
        ("Versions", text(versions)),
        ("Data", text(f"{data.name}: {samples}")),
        ("Training", text(f"micro_batch_size={training['micro_batch_size']}, epochs={training['epochs']}")),
        ("Techniques", text(techniques)),
    ]


def _value(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _advice(advice: Advice | None) -> list[str]:
    if not advice:
        return []
    lines = "".join(f"<li>{text(line)}</li>" for line in advice.lines)
    return [f"<h2>{text(advice_title(advice))}</h2>", f"<ul>{lines}</ul>"]


def _section(table: Table) -> list[str]:
    return [f"<h2>{text(table.title)}</h2>", html_table(table), notes(table.notes)]


def _bars(plan: Plan) -> list[str]:
    groups: list[Group] = [planned_group(plan, gpu) for gpu in plan.gpus]
    entries = category_colours()
    if any(group.on_cuda for group in groups):
        entries.append((UNUSED, RESERVED_COLOUR, False))
    if any(limit_in_picture(group) is not None for group in groups):
        entries.append((f"{USABLE}: all but the CUDA context", LIMIT_COLOUR, True))
    panels = panel_pictures(plan)
    names = [f"memory by category, {gpu['name']}" for gpu in plan.gpus] + ["runtime"]
    body = [legend(entries), pictures(panels, names[: len(panels)])]
    if heat := heat_map_picture(plan):
        body.insert(0, "<p>Memory needed, of what each card has:</p>")
        body.insert(1, pictures([heat], ["memory needed by card"], "whole"))
    return body


def _timelines(rows: list[PlanRow], limit: float | None) -> list[str]:
    """The baseline's and the smallest's large, the others' folded."""
    drawn = [row for row in rows if not row.error and len(row.timeline) > 1]
    if not drawn:
        return []
    smallest = min((row for row in drawn if row.fits is not False), key=_needed, default=drawn[0])
    names = {row.combination for row in (baseline_of(drawn), smallest) if row is not None}
    large = [row for row in drawn if row.combination in names]
    others = [row for row in drawn if row.combination not in names]
    limits = [(USABLE, LIMIT_COLOUR, True)] if limit is not None else []
    body = ["<h2>Memory over one step</h2>", legend(category_colours() + limits), _drawn(large, limit, LARGE)]
    if others:
        body.append(f"<details><summary>The other combinations</summary>{_drawn(others, limit, SMALL)}</details>")
    return [*body, notes([TIMELINE_NOTE])]


def _needed(row: PlanRow) -> float:
    return row.required_mib or row.peak_memory_mib or 0.0


def _drawn(rows: list[PlanRow], limit: float | None, size: tuple[float, float]) -> str:
    panels = [timeline_picture(row, limit, *size) for row in rows]
    return pictures(panels, [f"memory over a step, {combination_label(row.optim)}" for row in rows])


def _breakdown(row: PlanRow) -> str:
    name = text(combination_label(row.optim))
    return f"<details><summary>Tensors at the peak: {name}</summary>{breakdown_table(row.breakdown)}</details>"
