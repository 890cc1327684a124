"""Pages from the templates in this folder: HTML files that need nothing but themselves."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llama_ft.config.techniques import combination_label
from llama_ft.records import CATEGORIES
from llama_ft.records.result import CONFIG_FILE, MemoryItem, Result
from llama_ft.reporting.figure import COLOURS, LIMIT_COLOUR
from llama_ft.reporting.results import value_of
from llama_ft.reporting.table import MAIN, MARKS, UNKNOWN, Rows, Table, amount, is_failure

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what a page may not hold, escaped or not
CATEGORY_COLOURS = {category.replace("_", " "): colour for category, colour in COLOURS.items()}


def render(template: str, **values: Any) -> str:
    """A whole page: nothing in the values is taken for markup."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["base64"] = lambda content: base64.b64encode(content).decode()
    pages.globals |= {"MAIN": MAIN, "is_failure": is_failure, "LIMIT_COLOUR": LIMIT_COLOUR, "CONFIG_FILE": CONFIG_FILE}
    pages.globals |= {"combination_label": combination_label, "category_colours": CATEGORY_COLOURS}
    pages.globals |= {"breakdown_table": breakdown_table, "versions_text": versions_text}
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", pages.get_template(template).render(values))


def versions_text(versions: dict[str, str | None]) -> str:
    """Names and versions, without those that are not there."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def memory_table(results: Sequence[Result]) -> Table:
    """Each run's memory by category at the instant of its peak, and the instant."""
    rows: Rows = []
    for result in results:
        cells = [*[UNKNOWN] * len(CATEGORIES), MARKS.get(result.status, UNKNOWN), UNKNOWN]
        if memory := value_of(result, "memory_mib"):
            parts = [amount(memory.get(category, 0.0)) for category in CATEGORIES]
            cells = [*parts, amount(sum(memory.values())), result.peak_phase or UNKNOWN]
        rows.append((combination_label(result.optim), cells))
    return Table("Memory at the peak", [("", [*CATEGORY_COLOURS, "sum", "during"])], rows, [])


def breakdown_table(breakdown: list[MemoryItem]) -> Table:
    """What the memory at the peak consists of, by category and dtype."""
    rows: Rows = []
    for part in sorted(breakdown, key=lambda part: (CATEGORIES.index(part.category), part.dtype)):
        name = part.category.replace("_", " ") + (f" ({part.item})" if part.item else "")
        rows.append((name, [part.dtype, "<0.01" if 0 < part.mib < 0.005 else amount(part.mib)]))
    return Table("Tensors at the peak", [("", ["dtype", "MiB"])], rows, [])
