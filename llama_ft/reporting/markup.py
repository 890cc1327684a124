"""HTML: escaped text, tables, a whole document that needs nothing but itself."""

import base64
import re
from html import escape
from pathlib import Path

from llama_ft.reporting.table import MAIN, Table, is_failure

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
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


def html_table(table: Table, cell_classes: dict[int, list[str]] | None = None, kind: str = "") -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        cell_classes: by the number of their row; those of marks of failed runs are known.
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
        classes = (cell_classes or {}).get(number) or ["bad" if is_failure(cell) else "" for cell in cells]
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
