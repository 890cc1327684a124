"""A sweep's report as one HTML page that needs nothing but itself."""

import base64
from html import escape
from pathlib import Path
from typing import Any

from llama_ft.measure.result import CATEGORIES, CONFIG_FILE
from llama_ft.reporting.curves import curves_svg, read_metrics
from llama_ft.reporting.progress import ending
from llama_ft.reporting.results import Group, label
from llama_ft.reporting.table2 import MARKS, Table, amount

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto; max-width: 72rem;
  padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin: 1rem 0; }
th, td { padding: .25rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e3e3; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 500; }
tr.heading th, tr.heading td { font-weight: 600; } tr.rule > * { border-bottom: 2px solid #888; }
tr.main > * { font-weight: 600; } td.bad, .bad { color: #b3261e; } td.changed { background: #fff3d6; }
img { max-width: 100%; height: auto; } .curves svg { width: 100%; min-width: 56rem; height: auto; }
details { border: 1px solid #e3e3e3; border-radius: .4rem; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; } summary small { color: #555; margin-left: .75rem; }
pre { background: #f6f6f6; padding: .75rem; overflow-x: auto; font-size: .8rem; }
ul.notes { color: #555; font-size: .9rem; }
"""


def document(title: str, body: list[str]) -> str:
    """A whole page."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>",
            *body,
            "</body></html>\n",
        ]
    )


def sweep_page(name: str, groups: list[Group], tables: list[Table], picture: Path) -> str:
    """Tables, picture, and for each run its curves, environment, command and config."""
    body = []
    for table in tables:
        rows = [table_row(cells, text, "heading") for text, cells in table.techniques]
        rows += [table_row(cells, text, _kind(text)) for text, cells in table.rows]
        body += [f"<h2>{escape(table.title)}</h2>", table_of(rows), notes(table.notes)]
    body += [f'<p><img alt="Peak memory by category, and runtime" src="{data_url(picture)}"></p>']
    for group in groups:
        body += [f"<h2>Memory at the peak, MB · {escape(group.title)}</h2>", memory_table(group)]
    for group in groups:
        body += [f"<h2>Runs · {escape(group.title)}</h2>"]
        body += [run_section(result, folder) for result, folder in zip(group.results, group.folders, strict=True)]
    return document(name, body)


def comparison_page(title: str, tables: list[Table], picture: Path) -> str:
    """Two sweeps side by side, differences marked."""
    body = []
    for table in tables:
        rows = [table_row(cells, text, "heading") for text, cells in table.techniques]
        for text, cells in table.rows:
            changed = ["changed" if text.strip() == "difference" and cell != "=" else "" for cell in cells]
            rows.append(table_row(cells, text, "rule" if text.strip() == "difference" else "", changed))
        body += [f"<h2>{escape(table.title)}</h2>", table_of(rows), notes(table.notes)]
    body.append(f'<p><img alt="Peak memory and runtime, A beside B" src="{data_url(picture)}"></p>')
    return document(title, body)


def _kind(text: str) -> str:
    return "main" if text.startswith(("Peak memory", "Runtime")) else ""


def table_of(rows: list[str]) -> str:
    """Rows as a table that scrolls sideways where it is too wide."""
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def table_row(cells: list[str], name: str, kind: str = "", classes: list[str] | None = None) -> str:
    """A row, with a class for each cell where one is given; marks of failed runs have theirs."""
    marks = classes or ["bad" if cell in MARKS.values() else "" for cell in cells]
    inner = "".join(
        f'<td class="{mark}">{escape(cell)}</td>' if mark else f"<td>{escape(cell)}</td>"
        for cell, mark in zip(cells, marks, strict=True)
    )
    return f'<tr class="{kind}"><th>{escape(name.strip())}</th>{inner}</tr>\n'


def notes(lines: list[str]) -> str:
    """The notes under a table."""
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def data_url(picture: Path) -> str:
    """A picture's content, to stand in the page."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def memory_table(group: Group) -> str:
    """Each run's memory by category at the instant of its peak, and the instant."""
    names = [category.replace("_", " ") for category in CATEGORIES]
    rows = [table_row([*names, "sum", "instant"], "", "heading rule")]
    for result in group.results:
        if result["status"] == "ok" and result["memory_mb"]:
            memory = [amount(result["memory_mb"][category]) for category in CATEGORIES]
            cells = [*memory, amount(sum(result["memory_mb"].values())), result["memory_instant"] or "–"]
        else:
            cells = [MARKS.get(result["status"], "–"), *["–"] * (len(names) + 1)]
        rows.append(table_row(cells, label(result)))
    return table_of(rows)


def run_section(result: dict[str, Any], folder: Path) -> str:
    """A run, folded: what it ended with, its curves, and what is needed to repeat it."""
    failed = result["status"] != "ok"
    title = f"<b>{escape(label(result))}</b><small{' class=bad' if failed else ''}>{escape(ending(result))}</small>"
    metrics = read_metrics(folder)
    parts = [f'<div class="wide curves">{curves_svg(metrics)}</div>' if metrics else "<p>No steps were trained.</p>"]
    versions = {key: value for key, value in (result["versions"] or {}).items() if value}
    environment = [f"device: {result['device']}"] if result["device"] else []
    environment += [f"{key} {value}" for key, value in versions.items()]
    parts.append(f"<p>{escape(' · '.join(environment))}</p><pre>{escape(result['command'])}</pre>")
    config = folder / CONFIG_FILE
    if config.exists():
        text = escape(config.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")
    return f"<details><summary>{title}</summary>{''.join(parts)}</details>\n"
