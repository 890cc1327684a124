"""What the comparison of two sweeps is made of: the same combinations in both, and how far their numbers are apart."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ft.reporting.results import COURSE, LABELS, TECHNIQUES, Group
from llama_ft.reporting.settings import SAME_SETTINGS, Difference, differing_settings
from llama_ft.reporting.table2 import CHANGED, MARKS, Table, amount

MEASURES = {
    "peak_memory_mib": "Peak memory, MiB",
    "peak_memory_reserved_mib": "Reserved, MiB",
    "runtime_s": "Runtime, s",
    "tokens_per_s": "Tokens/s",
    "train_loss_after": "Loss after",
}
SAME = "="
DIFFERENCE = "  difference"
Result = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A group of each sweep, cut down to the combinations that both have, in the same order."""

    a: Group
    b: Group
    table: Table
    settings: list[Difference]  # and devices and versions

    @property
    def settings_lines(self) -> list[str]:
        """What is not the same, a line each."""
        return [f"{name}: {a} in A, {b} in B" for name, a, b in self.settings] or [SAME_SETTINGS]


def match(first: list[Group], second: list[Group]) -> tuple[list[tuple[Group, Group]], list[str]]:
    """Groups of the same model, data and variation, and a note for each run that is in one folder only.

    A group is compared with one other: of several, with that whose settings and device are the same.
    """
    candidates = [(a, b) for a in first for b in second if _subject(a) == _subject(b) and _rows(a).keys() & _rows(b)]
    candidates.sort(key=lambda pair: _likeness(*pair), reverse=True)
    pairs: list[tuple[Group, Group]] = []
    for a, b in candidates:
        if not any(a is x or b is y for x, y in pairs):
            pairs.append((a, b))
    pairs.sort(key=lambda pair: next(i for i, group in enumerate(first) if group is pair[0]))
    notes = []
    for letter, groups, side in (("A", first, 0), ("B", second, 1)):
        for group in groups:
            pair = next((pair for pair in pairs if pair[side] is group), None)
            missing = [_name(key) for key in _rows(group) if pair is None or key not in _rows(pair[1 - side])]
            if missing:
                notes.append(f"Only in {letter}: {_title(group)}: {', '.join(missing)}")
    return [(_common(a, b), _common(b, a)) for a, b in pairs], notes


def _subject(group: Group) -> tuple[str, str, str]:
    return group.variant, group.results[0]["model"], group.results[0]["data"]


def _title(group: Group) -> str:
    variant, model, data = _subject(group)
    return " · ".join(filter(None, (model, data, variant)))


def _likeness(a: Group, b: Group) -> tuple[bool, ...]:
    keys = ("settings_hash", "device", "gpu")
    seen = [[{r.get(key) for r in group.results} - {None} for key in keys] for group in (a, b)]
    return tuple(bool(of_a & of_b) for of_a, of_b in zip(*seen, strict=True))


def _rows(group: Group) -> dict[tuple[str, int], tuple[Result, Path]]:
    """Runs by combination, numbered where a group has one more than once, as in copied folders."""
    names = [r["combination"] for r in group.results]
    keys = [(name, names[:i].count(name)) for i, name in enumerate(names)]
    return dict(zip(keys, zip(group.results, group.folders, strict=True), strict=True))


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]} ({key[1] + 1})" if key[1] else key[0]


def _common(group: Group, other: Group) -> Group:
    kept = [run for key, run in _rows(group).items() if key in _rows(other)]
    return Group(group.variant, [result for result, _ in kept], [folder for _, folder in kept])


def compared(a: Group, b: Group) -> Comparison:
    """Each measure in A, in B, and the difference, for every combination."""
    shown = [name for name in TECHNIQUES if name in COURSE or any(r["optim"][name] for r in a.results)]
    techniques = [(LABELS[name], ["ON" if r["optim"][name] else "OFF" for r in a.results]) for name in shown]
    rows: list[tuple[str, list[str]]] = []
    for key, title in MEASURES.items():
        if any(r[key] is not None for r in (*a.results, *b.results)) or key in ("peak_memory_mib", "runtime_s"):
            rows.append((title, [""] * len(a.results)))
            rows += [(f"  {name}", [cell(r, key) for r in group.results]) for name, group in (("A", a), ("B", b))]
            pairs = zip(a.results, b.results, strict=True)
            rows.append((DIFFERENCE, [difference(of_a, of_b, key) for of_a, of_b in pairs]))
    notes = ["Difference: of B from A, in percent of A; of the loss, B less A.", *_why_failed(a, b)]
    if any(r["status"] == "oom" for r in (*a.results, *b.results)):
        notes.insert(1, "×: out of memory.")
    return Comparison(a, b, Table(f"{_title(a)}: A and B", techniques, rows, notes), differing_settings(a, b))


def _why_failed(a: Group, b: Group) -> list[str]:
    """What the rows died of that no mark explains."""
    return [
        f"{result['combination']} in {name}: {' '.join(str(result['error']).split())}"
        for name, group in (("A", a), ("B", b))
        for result in group.results
        if result["status"] in ("killed", "interrupted", "error")
    ]


def cell(result: Result, key: str) -> str:
    """A measure, or the mark of a run that failed."""
    if result["status"] != "ok" or result[key] is None:
        return "–" if result["status"] == "ok" else MARKS[result["status"]]
    return f"{result[key]:.3f}" if key == "train_loss_after" else amount(result[key])


def difference(a: Result, b: Result, key: str) -> str:
    """`=` where both read the same, a number where both have one, else that it changed."""
    if cell(a, key) == cell(b, key):
        return SAME
    number = change(a, b, key)
    if number is None:
        return CHANGED
    return f"{number:+.3f}" if key == "train_loss_after" else f"{number:+.1%}"


def change(a: Result, b: Result, key: str) -> float | None:
    """How far B's measure is from A's, as a share of A's, of the loss in itself; None where there is no number."""
    if not a["status"] == b["status"] == "ok":
        return None
    if any(value is None or not math.isfinite(value) for value in (a[key], b[key])):
        return None
    if key == "train_loss_after":
        return float(b[key] - a[key])
    return float(b[key] / a[key] - 1) if a[key] else None
