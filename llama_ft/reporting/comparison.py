"""Two sweeps, or a sweep and the plan that predicts it, side by side: each measure, and the difference."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, NamedTuple

from llama_ft.config.checks import Settings
from llama_ft.records.plan import Plan
from llama_ft.records.result import Result
from llama_ft.reporting import matching
from llama_ft.reporting.repeats import are_apart, runs_of, values_of
from llama_ft.reporting.results import Group, seeds_text, value_of
from llama_ft.reporting.table import CHANGED, UNKNOWN, Rows, Table, technique_rows
from llama_ft.reporting.table2 import MEASURES, REPEATS_NOTE, RUNS, Measure, cell, failures, run_counts

# Compared by absolute differences, in these formats, not by shares.
LEARNED = {"train_loss_after": "{:+.3f}", "eval_loss": "{:+.3f}", "eval_token_accuracy": "{:+.1%}"}
COMPARED = [measure for measure in MEASURES if measure.key not in ("peak_rss_mib", "train_loss_before")]
PREDICTED = [measure for measure in COMPARED if measure.key not in (*LEARNED, "tokens_per_s")]
WITHIN = "~"  # after a difference that is within the spread of repeats
SAME_SETTINGS = "Settings, device and versions are the same."


class Sides(NamedTuple):
    """The names of the two sides."""

    names: tuple[str, str]
    suffixes: tuple[str, str]  # after a value of a setting
    difference: str
    no_number: str  # in place of a missing difference


SWEEPS = Sides(("A", "B"), ("in A", "in B"), "difference", CHANGED)
SWEEP_AND_PLAN = Sides(("measured", "predicted"), ("in the sweep", "in the plan"), "error", UNKNOWN)


@dataclass(frozen=True)
class Comparison:
    """Two groups that have the same combinations in the same order."""

    title: str
    a: Group
    b: Group
    sides: Sides
    settings: list[matching.Difference]  # and devices and versions
    notes: list[str] = field(default_factory=list)
    not_alike: tuple[str, ...] = ()  # the measures whose difference would be meaningless
    is_bound: bool = False  # B's runtimes are bounds

    @property
    def pairs(self) -> list[tuple[Result, Result]]:
        """The runs, combination by combination."""
        return list(zip(self.a.results, self.b.results, strict=True))

    @property
    def names(self) -> list[str]:
        """The names of the runs, in notes."""
        return self.a.labels if self.a.settings else [result.combination for result in self.a.results]

    @property
    def settings_lines(self) -> list[str]:
        """The settings that are not the same, a line each."""
        in_a, in_b = self.sides.suffixes
        return [f"{name}: {a} {in_a}, {b} {in_b}" for name, a, b in self.settings] or [SAME_SETTINGS]

    @property
    def measures(self) -> list[Measure]:
        """The measures to show: those of which a run on either side has a value, and some always."""
        results, compared = [*self.a.results, *self.b.results], COMPARED if self.sides is SWEEPS else PREDICTED
        return [m for m in compared if m.always or any(getattr(result, m.key) is not None for result in results)]

    @property
    def table(self) -> Table:
        """Each measure on both sides, and the difference, for every combination; in rows if settings differ too."""
        if self.a.settings:
            return self._rows_for_runs()
        rows: Rows = []
        for title, columns in self._columns():
            rows.append((title, [""] * len(self.pairs)))
            rows += [(f"  {name}", cells) for name, cells in columns]
        of_both = [run_counts(group.results) for group in (self.a, self.b)]
        if any(of_both):
            rows.append((RUNS, [""] * len(self.pairs)))
            rows += [(f"  {name}", cells) for name, cells in zip(self.sides.names, of_both, strict=True) if cells]
        return Table(self.title, technique_rows(a.optim for a in self.a.results), rows, self.notes)

    def _rows_for_runs(self) -> Table:
        """A row for each run, and three columns for each measure."""
        columns = [(title, *column) for title, of_measure in self._columns() for column in of_measure]
        name_a = self.sides.names[0]
        head = [title if name == name_a else name for title, name, _ in columns]
        short = [title.partition(" ")[0].rstrip(",") if name == name_a else name for title, name, _ in columns]
        rows = [(label, [cells[n] for *_, cells in columns]) for n, label in enumerate(self.a.labels)]
        return Table(self.title, [("", head)], rows, self.notes, len(head), gap=2, narrow_head=[("", short)])

    def _columns(self) -> Iterator[tuple[str, Rows]]:
        """Each measure's title, and the cells of both sides and of their difference."""
        name_a, name_b = self.sides.names
        for title, key, form, *_ in self.measures:
            of_b = "at best" if self.is_bound and key == "runtime_s" else name_b
            cells_a, cells_b = ([cell(r, key, form) for r in group.results] for group in (self.a, self.b))
            differences = [self._difference(a, b, key, form) for a, b in self.pairs]
            yield title, [(name_a, cells_a), (of_b, cells_b), (self.sides.difference, differences)]

    def _difference(self, a: Result, b: Result, key: str, form: Callable[[Any], str]) -> str:
        if key in self.not_alike:
            return UNKNOWN
        if cell(a, key, form, with_spread=False) == cell(b, key, form, with_spread=False):
            return "="
        number = self.change(a, b, key)
        if number is None:
            return self.sides.no_number
        is_within = are_apart(values_of(a, key), values_of(b, key)) is False  # None where one side has no repeats
        return LEARNED.get(key, "{:+.1%}").format(number) + (f" {WITHIN}" if is_within else "")

    def change(self, a: Result, b: Result, key: str) -> float | None:
        """B's difference from A, as a share of A's value, or absolute for losses and accuracy; None if unknown."""
        of_a, of_b = value_of(a, key), value_of(b, key)
        if key in self.not_alike or any(value is None or not math.isfinite(value) for value in (of_a, of_b)):
            return None
        if key in LEARNED:
            return float(of_b - of_a)
        return float(of_b / of_a - 1) if of_a else None


def compare_sweeps(first: list[Group], second: list[Group]) -> tuple[list[Comparison], list[str]]:
    """Each pair of groups that can be compared, and notes on what only one side has."""
    pairs, alone = matching.match_sweeps(first, second)
    comparisons = []
    for a, b in pairs:
        notes = ["Difference: of B from A, in percent of A; for losses and accuracy, B minus A."]
        notes += _repeats(a, b)
        if any("oom" in _statuses(result) for result in (*a.results, *b.results)):
            notes.append("×: out of memory.")
        for side, group in (("A", a), ("B", b)):
            notes += failures(group, [f"{result.combination} in {side}" for result in group.results])
        settings = matching.differing_settings(matching.group_settings(a), matching.group_settings(b))
        comparisons.append(Comparison(f"{matching.subject(a)}: A and B", a, b, SWEEPS, settings, notes))
    return comparisons, alone


def compare_plan(groups: list[Group], plan: Plan) -> tuple[list[Comparison], list[str]]:
    """Each group of a sweep with the rows of a plan that predict it, and why others are left out."""
    matches = [matching.match_plan(plan, group) for group in groups]
    left_out = [f"Left out: {match}" for match in matches if isinstance(match, str)]
    comparisons = []
    for match in matching.joined(plan, [match for match in matches if not isinstance(match, str)]):
        a, b, gpu, settings, notes = match
        title = f"{a.title} · measured and predicted for {gpu['name']}"
        not_alike, why = _not_alike(a, b, gpu)
        is_bound = plan.time.kind == "bound" and any(row.runtime_s is not None for row in b.results)
        comparison = Comparison(title, a, b, SWEEP_AND_PLAN, settings, [], not_alike, is_bound)
        comparison.notes.extend([*summary(comparison), *notes, *_plan_notes(plan, comparison), *why])
        for side, group in (("measured", a), ("predicted", b)):
            comparison.notes.extend(failures(group, [f"{name}, {side}" for name in comparison.names]))
        comparisons.append(comparison)
    return comparisons, left_out


def _repeats(a: Group, b: Group) -> list[str]:
    sides = [f"{side} {seeds_text(group.seeds)}" for side, group in (("A", a), ("B", b)) if group.seeds]
    notes = [f"Seeds: {'; '.join(sides)}.", REPEATS_NOTE] if sides else []
    if len(sides) == 2:
        within = "the difference is within the spread of the runs (Welch's t-test at 95 %)"
        notes.append(f"{WITHIN}: {within}; without {WITHIN} it is larger, if both sides have two runs or more.")
    return notes


def _not_alike(measured: Group, planned: Group, gpu: Settings) -> tuple[tuple[str, ...], list[str]]:
    """Keys of the measures not to compare, since the plan is for other data or another device, and a note on why."""
    pairs = [(a, b) for a, b in zip(measured.results, planned.results, strict=True) if a.tokens and b.tokens]
    lengths = [tuple((run.tokens or 0) / (run.samples or 1) for run in pair) for pair in pairs]
    if other := [(a, b) for a, b in lengths if a != b]:
        why = (
            f"Not the same data: {other[0][0]:.1f} tokens a sample in the sweep, {other[0][1]:.1f} in the plan. So"
            " errors are left out; to get them, give plan the sweep's arguments (model, data, tokenizer, training)."
        )
        return tuple(measure.key for measure in PREDICTED), [why]
    if matching.is_device(gpu, measured) and all(a.tokens == b.tokens for a, b in pairs):
        return (), []
    why = "other numbers of tokens" if matching.is_device(gpu, measured) else f"{measured.device} and of {gpu['name']}"
    return ("runtime_s",), [f"Runtimes are of {why}, so their errors are left out."]


def summary(comparison: Comparison) -> list[str]:
    """For each measure the mean, median and worst error; the runs predicted to fit that did not, and the reverse."""
    notes = ["Error: of the prediction, in percent of the measured value."]
    named = list(zip(comparison.names, comparison.pairs, strict=True))
    for measure in PREDICTED:
        changes = [(comparison.change(*pair, measure.key), name) for name, pair in named]
        if errors := [(error, name) for error, name in changes if error is not None]:
            sizes = [abs(error) for error, _ in errors]
            worst, name = max(errors, key=lambda error: abs(error[0]))
            middle = f"mean {fmean(sizes):.1%}, median {median(sizes):.1%}"
            what = measure.title.partition(",")[0]
            notes.append(f"{what}: absolute error, {middle}; worst {worst:+.1%} ({name}).")
    if comparison.b.memory_limit_mib is not None and "peak_memory_mib" not in comparison.not_alike:
        for planned, measured, words in (("ok", "oom", "to fit and did not"), ("oom", "ok", "not to fit and did")):
            wrong = [name for name, (a, b) in named if b.status == planned and measured in _statuses(a)]
            notes += [f"Predicted {words}: {', '.join(wrong)}."] if wrong else []
    return notes


def _statuses(result: Result) -> set[str]:
    return {run.result.status for run in runs_of(result)}


def _plan_notes(plan: Plan, comparison: Comparison) -> list[str]:
    pairs, notes = comparison.pairs, []
    if seeds := comparison.a.seeds:
        notes += [f"Seeds of the measured runs: {seeds_text(seeds)}.", REPEATS_NOTE]
    if any("oom" in _statuses(result) for pair in pairs for result in pair):
        notes.append("×: out of memory; predicted: needs more memory than the card has.")
    if plan.data.is_stand_in:
        notes.append(f"Data of the plan: {plan.data.about}.")
    if all(b.runtime_s is None for _, b in pairs):
        notes.append("No runtime is predicted.")
    elif any(value_of(a, "runtime_s") is not None for a, _ in pairs):
        notes.append(f"Runtime: {' '.join(plan.time.about.split())}.")
    return notes
