"""HTML: escaped text, tables, a whole document that needs nothing but itself."""

import base64
import re
from html import escape

from llama_ft.reporting.table import MAIN, Table, is_failure

STYLE = """
:root { color-scheme: light; --line: #dcdcdc; --soft: #595959; } body { font: 16px/1.5 system-ui, sans-serif; color:
#1b1b1b; background: #fff; margin: 0 auto; max-width: 76rem; padding: 1rem; overflow-wrap: break-word; } h1 { font-size:
1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 0; line-height: 1.35; text-wrap: balance; } h3 {
font-size: 1.05rem; margin: 2rem 0 0; } p { margin: .5rem 0; } .soft, .notes { color: var(--soft); } .notes { font-size:
.9rem; } ul.notes { padding-left: 1.2rem; } .bad { color: #b3261e; } .wide { overflow-x: auto; margin: 1rem 0;
background: linear-gradient(to left, #fff 40%, #fff0) right top / 3rem 200% no-repeat local, linear-gradient(to left,
#0003, #0000) right top / .7rem calc(100% - 2px) no-repeat scroll; } table { border-collapse: collapse;
font-variant-numeric: tabular-nums; font-size: .9rem; } th, td { padding: .25rem .6rem; text-align: right; white-space:
nowrap; border-bottom: 1px solid var(--line); } th { font-weight: 400; } tr > th:first-child { text-align: left;
position: sticky; left: 0; background: #fff; padding-left: 0; } thead th { font-weight: 600; border: 0; padding-block:
.1rem; } thead tr:last-child th { border-bottom: 2px solid #777; } thead .off { font-weight: 400; color: #767676; }
.many :is(th, td) { padding-inline: .3rem; } table:not(.texts) :is(th, td) { min-width: 2.2rem; } .main > * {
font-weight: 600; } .section > * { font-weight: 600; border-bottom: 0; padding-top: .7rem; } .named tbody th {
white-space: normal; min-width: 11rem; max-width: 20rem; } tr.sub > th:first-child { padding-left: 1rem; color:
var(--soft); } .texts :is(th, td) { text-align: left; } .texts td { white-space: normal; overflow-wrap: break-word; }
td.better { background: #d6e9f8; } td.worse { background: #fde3c8; } td.changed { background: #ffef9e; font-weight: 600;
} .pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .5rem 1.5rem;
max-width: 76rem; } .pictures img { width: 100%; max-width: 42rem; height: auto; } .pictures.whole img { max-width:
60rem; } .legend { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; font-size: .9rem; margin: 1rem 0 .25rem; padding:
0; list-style: none; } .legend i { display: inline-block; width: 1.1rem; height: .7rem; margin-right: .4rem; } .legend
i.line { height: 0; border-top: 2px dashed; vertical-align: middle; } .pictures.charts { grid-template-columns:
repeat(auto-fill, minmax(13rem, 1fr)); margin: .75rem 0; } .pictures.charts img { max-width: 22rem; } details { border:
1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .4rem .8rem; } summary { cursor: pointer; }
summary b { margin-right: .6rem; } summary span { font-size: .9rem; } summary span:not(.bad) { color: var(--soft); } dl
{ display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1rem; font-size: .9rem; } dt { color:
var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } pre, code { font: .85rem/1.45 ui-monospace, monospace; } pre {
background: #f5f5f5; padding: .75rem; overflow-x: auto; margin: .5rem 0; } @media (max-width: 40rem) { dl {
grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: .5rem; } }
"""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what a page may not hold, escaped or not


def text(value: object) -> str:
    """Anything as text of the page: nothing in it is taken for markup."""
    return escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def document(title: str, body: list[str]) -> str:
    """A whole page."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body>",
            *body,
            "</body></html>\n",
        ]
    )


def html_table(table: Table, kinds: dict[int, list[str]] | None = None, kind: str = "") -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        kinds: classes of cells, by the number of their row; those of marks of failed runs are known.
        kind: `texts` for cells that hold texts.
    """
    is_wide, has_long_names = len(table.head[0][1]) > 8, table.max_name_length
    kind = kind or ("many" if is_wide else "named" if has_long_names else "")
    head = [
        _row(name, [f'<th scope="col"{" class=off" if cell == "OFF" else ""}>{text(cell)}</th>' for cell in cells])
        for name, cells in table.head
    ]
    body = []
    for number, (name, cells) in enumerate(table.rows):
        classes = (kinds or {}).get(number) or ["bad" if is_failure(cell) else "" for cell in cells]
        inner = [f"<td{_class(of)}>{text(cell)}</td>" for cell, of in zip(cells, classes, strict=True)]
        is_section, is_main = not any(cells), name.startswith(MAIN)
        body.append(_row(name, inner, "section" if is_section else "main" if is_main else "sub" * (name[:1] == " ")))
    return (
        f'<div class="wide" role="region" aria-label="{text(table.title)}" tabindex="0"><table{_class(kind)}>\n'
        f"<thead>\n{''.join(head)}</thead>\n<tbody>\n{''.join(body)}</tbody></table></div>"
    )


def _row(name: str, cells: list[str], kind: str = "") -> str:
    return f'<tr{_class(kind)}><th scope="row">{text(name.strip())}</th>{"".join(cells)}</tr>\n'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def notes(lines: list[str]) -> str:
    """The notes under a table."""
    return f'<ul class="notes">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>' if lines else ""


def legend(entries: list[tuple[str, str, bool]]) -> str:
    """What the colours of a picture are: (text, colour, whether it is a dashed line)."""
    keys = [
        f'<li><i class="line" style="color:{colour}"></i>{text(name)}</li>'
        if dashed
        else f'<li><i style="background:{colour}"></i>{text(name)}</li>'
        for name, colour, dashed in entries
    ]
    return f'<ul class="legend">{"".join(keys)}</ul>'


def pictures(panels: list[bytes], names: list[str], kind: str = "") -> str:
    """SVG pictures in the page itself, beside each other where there is room.

    Args:
        kind: `whole` for one as wide as the page, `charts` for many small ones.
    """
    images = [
        f'<img alt="{text(name)}" src="data:image/svg+xml;base64,{base64.b64encode(panel).decode()}">'
        for name, panel in zip(names, panels, strict=True)
    ]
    return f'<div class="{f"pictures {kind}".strip()}">{"".join(images)}</div>\n'


def facts(pairs: list[tuple[str, str]]) -> str:
    """Names and values; the values are markup already."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{value}</dd>' for name, value in pairs)}</dl>"
