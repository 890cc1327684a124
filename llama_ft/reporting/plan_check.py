"""Prediction beside measurement: a sweep's runs and a plan's rows of the same combination, model and data."""

import csv
import io
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console

from llama_ft.config import UserError
from llama_ft.files import write_text
from llama_ft.reporting.plan_file import PLAN_FILE, Plan, read_plan
from llama_ft.reporting.plan_match import MEMORY, RUNTIME, Check, Measure, Pair, is_device, match
from llama_ft.reporting.results import COURSE, LABELS, TECHNIQUES, read_groups
from llama_ft.reporting.table2 import MARKS, Table, amount, markdown, print_notes, print_table

FILES = ("plan_check.md", "plan_check.csv")
UNKNOWN, ERROR = "–", MARKS["error"]


def report_check(sweep: Path, folder: Path, console: Console) -> None:
    """Print and write the comparison, into the plan's folder.

    Raises:
        UserError: if a file is damaged, nothing of the sweep was planned, or the folder cannot be written to.
    """
    plan, groups = read_plan(folder), read_groups(sweep)
    checks, left_out = match(plan, groups)
    if not checks:
        raise UserError(f"{folder / PLAN_FILE} predicts no run of {sweep}: {'; '.join(left_out)}")
    tables = [check_table(plan, check) for check in checks]
    about = [f"Measured: {sweep}", f"Predicted: {folder}", *(f"Left out: {line}" for line in left_out)]
    for table in tables:
        print_table(table, console)
    console.print()
    print_notes(about, console)
    try:
        text = "\n".join([*(markdown(table) for table in tables), *(f"- {line}" for line in about), ""])
        write_text(folder / FILES[0], text)
        write_text(folder / FILES[1], csv_text(plan, checks))
    except OSError as error:
        raise UserError(f"the comparison cannot be written into {folder}: {error.strerror}") from error
    console.print(f"\nWritten: {', '.join(FILES)} in {folder}", highlight=False, markup=False, soft_wrap=True)


def check_table(plan: Plan, check: Check) -> Table:
    """Each measure as it was measured and predicted, and the error, for every combination."""
    results = [pair.result for pair in check.pairs]
    shown = [name for name in TECHNIQUES if name in COURSE or any(r["optim"][name] for r in results)]
    techniques = [(LABELS[name], ["ON" if r["optim"][name] else "OFF" for r in results]) for name in shown]
    rows: list[tuple[str, list[str]]] = []
    for measure in (*MEMORY, RUNTIME):
        if measure is not RUNTIME and all(None in pair.values(measure) for pair in check.pairs) and rows:
            continue  # nothing is reserved on the CPU
        rows.append((measure.name, [""] * len(results)))
        rows.append(("  measured", [_measured(pair, measure) for pair in check.pairs]))
        is_planned = any(pair.values(measure)[1] is not None for pair in check.pairs)
        at_best = measure is RUNTIME and plan["time"]["kind"] == "bound" and is_planned
        rows.append(("  at best" if at_best else "  predicted", [_predicted(pair, measure) for pair in check.pairs]))
        rows.append(("  error", [_percent(pair.error(measure)) for pair in check.pairs]))
    if any(pair.row["fits"] is not None for pair in check.pairs):
        rows.append(("Fits", [""] * len(results)))
        rows.append(("  measured", [_fits(pair.fitted) for pair in check.pairs]))
        rows.append(("  predicted", [_fits(pair.row["fits"]) for pair in check.pairs]))
    title = f"{check.group.title} · measured and predicted for {check.gpu['name']}"
    return Table(title, techniques, rows, [*summary(check), *_notes(plan, check)])


def _measured(pair: Pair, measure: Measure) -> str:
    if pair.result["status"] != "ok":
        return MARKS[pair.result["status"]]
    return _amount(pair.values(measure)[0])


def _predicted(pair: Pair, measure: Measure) -> str:
    return ERROR if pair.row["error"] else _amount(pair.values(measure)[1])


def _amount(value: float | None) -> str:
    return UNKNOWN if value is None else amount(value)


def _percent(error: float | None) -> str:
    return UNKNOWN if error is None else f"{error:+.1%}"


def _fits(fits: bool | None) -> str:
    return UNKNOWN if fits is None else "yes" if fits else MARKS["oom"]


def summary(check: Check) -> list[str]:
    """For each measure the mean, median and worst error, and what was predicted to fit and did not, or the reverse."""
    notes = ["Error: of the prediction, in per cent of what was measured."]
    for measure in (*MEMORY, RUNTIME):
        errors = [(error, p.row["combination"]) for p in check.pairs if (error := p.error(measure)) is not None]
        if errors:
            sizes = [abs(error) for error, _ in errors]
            worst, name = max(errors, key=lambda error: abs(error[0]))
            notes.append(
                f"{measure.name.partition(',')[0]}: absolute error {fmean(sizes):.1%} in the mean, {median(sizes):.1%}"
                f" in the median, at worst {worst:+.1%} ({name})."
            )
    same_data = all(pair.same_data for pair in check.pairs)
    judged = [(p.row["fits"], p.fitted, p.row["combination"]) for p in check.pairs if same_data]
    for fits, words in ((True, "fit and did not"), (False, "need too much and fitted")):
        wrong = [name for predicted, fitted, name in judged if predicted is fits and fitted is (not fits)]
        if wrong:
            notes.append(f"Predicted to {words}: {', '.join(wrong)}.")
    return notes


def _notes(plan: Plan, check: Check) -> list[str]:
    group, notes = check.group, list(check.notes)
    if plan["data"]["is_stand_in"]:
        notes.append(f"Data of the plan: {plan['data']['about']}.")
    others = next((pair for pair in check.pairs if not pair.same_data), None)
    if others is not None:
        lengths = (f"{run['tokens'] / run['samples']:.1f}" for run in (others.result, others.row))
        notes.append(
            f"Not the same data: {' tokens a sample in the sweep, '.join(lengths)} in the plan. So errors are left out;"
            " to have them, give plan the sweep's arguments (model, data, tokenizer, training)."
        )
    notes += _time_notes(plan, check)
    versions: dict[str, Any] = next((r["versions"] for r in group.results if r["versions"]), {})
    torches = versions.get("torch"), plan["versions"].get("torch")
    if torches[0] != torches[1]:
        notes.append(f"Not the same: torch is {torches[0]} in the sweep, {torches[1]} in the plan.")
    failed = [p for p in check.pairs if p.result["status"] in ("killed", "interrupted", "error")]
    notes += [f"{p.row['combination']}, measured: {' '.join(str(p.result['error']).split())}" for p in failed]
    unplanned = [p for p in check.pairs if p.row["error"]]
    return notes + [f"{p.row['combination']}, predicted: {' '.join(p.row['error'].split())}" for p in unplanned]


def _time_notes(plan: Plan, check: Check) -> list[str]:
    ended = [pair for pair in check.pairs if None not in pair.values(RUNTIME)]
    if not ended:
        return ["No runtime is predicted."] if all(p.row["runtime_s"] is None for p in check.pairs) else []
    notes = [f"Runtime: {' '.join(plan['time']['about'].split())}."]
    if not all(pair.same_times for pair in ended):
        device = next((r["device"] for r in check.group.results if r["device"]), None)
        of_same_device = is_device(check.gpu, check.group)
        why = "other numbers of tokens" if of_same_device else f"{device} and of {check.gpu['name']}"
        notes.append(f"Runtimes are of {why}, so their errors are left out.")
    return notes


def csv_text(plan: Plan, checks: list[Check]) -> str:
    """For `plan_check.csv`: a row for each pair, numbers unrounded, errors in per cent."""
    names = [measure.measured for measure in (*MEMORY, RUNTIME)]
    columns = [f"{name}.{part}" for name in names for part in ("measured", "predicted", "error_percent")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        "combination variant model data device gpu status fits_measured fits_predicted time_kind".split() + columns
    )
    for check in checks:
        for pair in check.pairs:
            result = pair.result
            known = [result[key] for key in ("combination", "model", "data", "device")]
            values: list[Any] = []
            for measure in (*MEMORY, RUNTIME):
                error = pair.error(measure)
                values += [*pair.values(measure), None if error is None else 100 * error]
            about = [check.gpu["name"], result["status"], pair.fitted, pair.row["fits"], plan["time"]["kind"]]
            writer.writerow([known[0], check.group.variant, *known[1:], *about, *values])
    return out.getvalue()
