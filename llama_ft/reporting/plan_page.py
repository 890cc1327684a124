"""A plan as one HTML page that needs nothing but itself, to be sent to whom it concerns."""

from typing import Any

from llama_ft.reporting.figure import LIMIT_COLOUR
from llama_ft.reporting.markup import document, facts, legend, notes, pictures, text
from llama_ft.reporting.page import category_colours, ledger_table, memory_table, table2_of
from llama_ft.reporting.plan_figure import (
    RESERVED_COLOUR,
    UNUSED,
    USABLE,
    has_times,
    heat_map_svg,
    limit_in_bars,
    memory_panels,
    runtime_svg,
    timeline_svg,
    usable_mib,
)
from llama_ft.reporting.plan_file import Plan, Rows, baseline_of, rows_on
from llama_ft.reporting.plan_tables import advice_title, tables_of, title
from llama_ft.reporting.results import label
from llama_ft.reporting.settings import flat
from llama_ft.reporting.table2 import Table

LARGE, SMALL = (5.2, 3.2), (5.2, 2.4)  # inches of a timeline
TIMELINE_NOTE = (
    "Tensors over one optimizer step, from its first allocation to its last; of several micro-batches, the"
    " last one. The step starts with parameters and optimizer state; activations grow in the forward pass and go in the"
    " backward pass, which leaves gradients."
)


def plan_page(plan: Plan) -> str:
    """What was planned; advice; Table 2 with its pictures; memory over a step; Table 1; the tensors at each peak."""
    tables = tables_of(plan)
    first = rows_on(plan, plan["gpus"][0]["name"])
    gpus = plan["gpus"][0]["name"] if len(plan["gpus"]) == 1 else f"{len(plan['gpus'])} GPUs"
    body = [f"<h1>{text(plan['model'])} on {text(gpus)}</h1>", '<p class="soft">Plan of llama_ft: nothing was run</p>']
    body += [facts(_facts(plan)), *_advice(plan["advice"])]
    of_table1 = [tables.pop()] if plan["table1"] else []
    body += [part for table in tables for part in _section(table)]
    body += ["<h2>Memory by category</h2>", *_bars(plan)]
    body += _timelines(first, usable_mib(plan["gpus"][0]))
    body += [part for table in of_table1 for part in _section(table)]
    body += [f"<h2>Memory at the peak, MiB: {text(plan['gpus'][0]['name'])}</h2>", memory_table(as_results(first))]
    body += [_ledger(row) for row in first if row["breakdown"]]
    return document(f"{title(plan, gpus)} · llama_ft", body)


def _facts(plan: Plan) -> list[tuple[str, str]]:
    data, training = plan["data"], plan["training"]
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items() if version)
    samples = f"{data['samples']:,} samples, {data['tokens']:,} tokens, the longest {data['longest']:,}"
    techniques = ", ".join(f"{name}={_value(value)}" for name, value in flat(plan["techniques"]).items())
    return [
        ("Command", f"<code>{text(plan['command'])}</code>"),
        ("Versions", text(versions)),
        ("Data", text(f"{data['name']}: {samples}")),
        ("Training", text(f"micro_batch_size={training['micro_batch_size']}, epochs={training['epochs']}")),
        ("Techniques", text(techniques)),
    ]


def _value(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _advice(advice: dict[str, Any] | None) -> list[str]:
    if not advice:
        return []
    lines = "".join(f"<li>{text(line)}</li>" for line in advice["lines"])
    return [f"<h2>{text(advice_title(advice))}</h2>", f"<ul>{lines}</ul>"]


def _section(table: Table) -> list[str]:
    return [f"<h2>{text(table.title)}</h2>", table2_of(table), notes(table.notes)]


def _bars(plan: Plan) -> list[str]:
    gpus = plan["gpus"]
    rows = {gpu["name"]: rows_on(plan, gpu["name"]) for gpu in gpus}
    entries = category_colours()
    if any(row["reserved_mib"] is not None for row in plan["rows"]):
        entries.append((UNUSED, RESERVED_COLOUR, False))
    if any(limit_in_bars(gpu, rows[gpu["name"]]) is not None for gpu in gpus):
        entries.append((f"{USABLE}: all but the CUDA context", LIMIT_COLOUR, True))
    panels, names = memory_panels(plan), [f"memory by category, {gpu['name']}" for gpu in gpus]
    if len(gpus) == 1:
        if has_times(plan):
            panels, names = [*panels, runtime_svg(plan)], [*names, "runtime"]
        return [legend(entries), pictures(panels, names)]
    heat = heat_map_svg(plan)
    shares = (
        "<p>Memory needed, of what each card has:</p>" + pictures([heat], ["memory needed by card"], "whole")
        if heat
        else ""
    )
    return [shares, legend(entries), pictures(panels, names)]


def _timelines(rows: Rows, limit: float | None) -> list[str]:
    """The baseline's and the smallest's large, the others' folded."""
    drawn = [row for row in rows if not row["error"] and len(row["timeline"]) > 1]
    if not drawn:
        return []
    smallest = min((row for row in drawn if row["fits"] is not False), key=_needed, default=drawn[0])
    chosen = [row for row in (baseline_of(drawn), smallest) if row is not None]
    large = list({row["combination"]: row for row in chosen}.values())
    others = [row for row in drawn if all(row is not each for each in large)]
    limits = [(USABLE, LIMIT_COLOUR, True)] if limit is not None else []
    body = ["<h2>Memory over one step</h2>", legend(category_colours() + limits), _drawn(large, limit, LARGE)]
    if others:
        body.append(f"<details><summary>The other combinations</summary>{_drawn(others, limit, SMALL)}</details>")
    return [*body, notes([TIMELINE_NOTE])]


def _needed(row: dict[str, Any]) -> float:
    return float(row["peak_memory_mib"] if row["required_mib"] is None else row["required_mib"])


def _drawn(rows: Rows, limit: float | None, size: tuple[float, float]) -> str:
    panels = [timeline_svg(row, limit, *size) for row in rows]
    return pictures(panels, [f"memory over a step, {label(row)}" for row in rows])


def as_results(rows: Rows) -> list[dict[str, Any]]:
    """Rows as the measured tables know them."""
    return [row | {"status": "error" if row["error"] else "ok", "peak_phase": row["phase"]} for row in rows]


def _ledger(row: dict[str, Any]) -> str:
    return f"<details><summary>Tensors at the peak: {text(label(row))}</summary>{ledger_table(row['ledger'])}</details>"
