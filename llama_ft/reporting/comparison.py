"""Two sweeps side by side: the same combinations in both, what differs, and which settings do."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from llama_ft.config import UserError
from llama_ft.files import write_text
from llama_ft.measure.result import CONFIG_FILE
from llama_ft.reporting.results import LABELS, TECHNIQUES, Group, read_groups
from llama_ft.reporting.table2 import MARKS, Table, amount, markdown, terminal

FILES = ("comparison.md", "comparison.html", "comparison.png")
MEASURES = {"peak_memory_mb": "Peak memory, MB", "runtime_s": "Runtime, s", "eval_loss_after": "Loss after"}
SAME = "="
Result = dict[str, Any]


def report_comparison(first: Path, second: Path, console: Console) -> None:
    """Print and write the comparison, into the second folder.

    Raises:
        UserError: if a folder holds no results, they have no combination in common, or it cannot be written to.
    """
    matched = match(read_groups(first), read_groups(second))
    if not matched:
        raise UserError(f"{first} and {second} have no run of the same model, data and combination")
    tables = [comparison(a, b, (first, second)) for a, b in matched]
    for table in tables:
        console.print(f"\n{table.title}\n", style="bold", highlight=False, markup=False, soft_wrap=True)
        for view in terminal(table, console.width):
            console.print(view)
            console.print()
        for note in table.notes:
            console.print(f"  {note}", style="dim", highlight=False, markup=False, soft_wrap=True)
    from llama_ft.reporting.figure import draw_comparison
    from llama_ft.reporting.page import comparison_page

    try:
        write_text(second / FILES[0], "\n".join(markdown(table) for table in tables))
        draw_comparison(matched, second / FILES[2])
        title = f"{first.absolute().name} and {second.absolute().name}"
        write_text(second / FILES[1], comparison_page(title, tables, second / FILES[2]))
    except OSError as error:
        raise UserError(f"the comparison cannot be written into {second}: {error.strerror}") from error
    console.print(f"\nWritten: {', '.join(FILES)} in {second}", highlight=False, markup=False, soft_wrap=True)


def match(first: list[Group], second: list[Group]) -> list[tuple[Group, Group]]:
    """Groups of the same model, data and variation, each cut down to the combinations that both have."""
    pairs = []
    for a in first:
        for b in second:
            both = {r["combination"] for r in a.results} & {r["combination"] for r in b.results}
            if _subject(a) == _subject(b) and both:
                pairs.append((_only(a, both), _only(b, both)))
    return pairs


def _subject(group: Group) -> tuple[str, str, str]:
    return group.variant, group.results[0]["model"], group.results[0]["data"]


def _only(group: Group, combinations: set[str]) -> Group:
    kept = [run for run in zip(group.results, group.folders, strict=True) if run[0]["combination"] in combinations]
    return Group(group.variant, [result for result, _ in kept], [folder for _, folder in kept])


def comparison(a: Group, b: Group, folders: tuple[Path, Path]) -> Table:
    """Each measure in A, in B, and the difference, for every combination."""
    shown = [name for name in TECHNIQUES if name != "gc" or any(r["optim"]["gc"] for r in a.results)]
    techniques = [(LABELS[name], ["ON" if r["optim"][name] else "OFF" for r in a.results]) for name in shown]
    rows = []
    for key, text in MEASURES.items():
        cells = [[_cell(result, key) for result in group.results] for group in (a, b)]
        rows += [(f"{text}: A", cells[0]), ("  B", cells[1])]
        rows.append(("  difference", [_difference(*pair, key) for pair in zip(a.results, b.results, strict=True)]))
    variant = f" · {a.variant}" if a.variant else ""
    title = f"{a.results[0]['model']} · {a.results[0]['data']}{variant}: A and B"
    return Table(title, techniques, rows, [f"A: {folders[0]}", f"B: {folders[1]}", *_what_differs(a, b)])


def _cell(result: Result, key: str) -> str:
    if result["status"] != "ok" or result[key] is None:
        return MARKS.get(result["status"], "–")
    return f"{result[key]:.3f}" if key == "eval_loss_after" else amount(result[key])


def _difference(a: Result, b: Result, key: str) -> str:
    if _cell(a, key) == _cell(b, key):
        return SAME
    if not a["status"] == b["status"] == "ok" or None in (a[key], b[key]):
        return "changed"
    return f"{b[key] - a[key]:+.3f}" if key == "eval_loss_after" else f"{b[key] / a[key] - 1:+.1%}"


def _what_differs(a: Group, b: Group) -> list[str]:
    """Lines on the settings, the device and the versions that are not the same."""
    sides = []
    for group in (a, b):
        result, config = group.results[0], group.folders[0] / CONFIG_FILE
        settings = _flat(OmegaConf.to_container(OmegaConf.load(config))) if config.exists() else {}
        measured = next((r for r in group.results if r["versions"]), result)
        about = {"device": measured["device"], "memory_limit_mb": result["memory_limit_mb"]}
        sides.append(settings | about | (measured["versions"] or {}))
    keys = sorted(sides[0].keys() | sides[1].keys())
    lines = [f"{key}: {sides[0].get(key)} in A, {sides[1].get(key)} in B" for key in keys]
    differing = [line for key, line in zip(keys, lines, strict=True) if sides[0].get(key) != sides[1].get(key)]
    return differing or ["Settings, device and versions are the same."]


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    return {k: v for key, value in settings.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
