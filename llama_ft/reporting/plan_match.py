"""Which row of a plan predicts which run of a sweep, and how far off it is."""

import re
from dataclasses import dataclass
from typing import Any

from llama_ft.reporting.plan_file import Plan, rows_on
from llama_ft.reporting.results import Group
from llama_ft.reporting.settings import flat


@dataclass(frozen=True)
class Measure:
    """What is compared: its name, and where result and plan have it."""

    name: str
    measured: str
    predicted: str


MEMORY = (
    Measure("Peak memory, MiB", "peak_memory_mib", "peak_memory_mib"),
    Measure("Reserved, MiB", "peak_memory_reserved_mib", "reserved_mib"),
)
RUNTIME = Measure("Runtime, s", "runtime_s", "runtime_s")


@dataclass(frozen=True)
class Pair:
    """A run and the row that predicts it."""

    result: dict[str, Any]
    row: dict[str, Any]
    same_data: bool  # whether the row's samples are as long as this run's, so far as that is known
    same_times: bool  # whether the row's runtime is of this run's device and tokens

    def values(self, measure: Measure) -> tuple[float | None, float | None]:
        """What was measured, and what was predicted."""
        measured = self.result[measure.measured] if self.result["status"] == "ok" else None
        return measured, None if self.row["error"] else self.row[measure.predicted]

    def error(self, measure: Measure) -> float | None:
        """The prediction's signed error as a share of what was measured; None where there is none to be had."""
        measured, predicted = self.values(measure)
        if not (self.same_times if measure is RUNTIME else self.same_data):
            return None
        return None if not measured or predicted is None else predicted / measured - 1

    @property
    def fitted(self) -> bool | None:
        """Whether the run fitted; None where that is not known."""
        return {"ok": True, "oom": False}.get(self.result["status"])


@dataclass(frozen=True)
class Check:
    """A group of runs beside the rows of one card."""

    group: Group
    gpu: dict[str, Any]
    pairs: list[Pair]
    notes: list[str]


def match(plan: Plan, groups: list[Group]) -> tuple[list[Check], list[str]]:
    """Runs with the rows that predict them, and lines on what neither side has a partner for."""
    checks, left_out = [], []
    for group in groups:
        first = group.results[0]
        if (first["model"], first["data"]) != (plan["model"], plan["data"]["name"]):
            left_out.append(f"{group.title}: the plan is of {plan['model']} on {plan['data']['name']}")
            continue
        gpu = gpu_of(plan, group)
        if gpu is None:
            names = ", ".join(each["name"] for each in plan["gpus"])
            left_out.append(f"{group.title}, gpu={first['gpu']}: the plan is of {names}")
            continue
        check = _check(plan, group, gpu)
        if check.pairs:
            checks.append(check)
        else:
            left_out.append(f"{group.title}: {'; '.join(check.notes)}")
    return checks, left_out


def _check(plan: Plan, group: Group, gpu: dict[str, Any]) -> Check:
    rows = {row["combination"]: row for row in rows_on(plan, gpu["name"])}
    pairs, missing = [], []
    left_out: dict[str, list[str]] = {}  # by reason
    for result in group.results:
        row = rows.pop(result["combination"], None)
        if row is None:
            missing.append(result["combination"])
        elif reason := _other_run(plan, row, result):
            left_out.setdefault(reason, []).append(result["combination"])
        else:
            times = is_device(gpu, group) and row["tokens"] == result["tokens"]
            pairs.append(Pair(result, row, _same_lengths(row, result), times))
    notes = [f"Measured alone: {', '.join(missing)}."] if missing else []
    notes += [f"Predicted alone: {', '.join(rows)}."] if rows else []
    return Check(
        group, gpu, pairs, notes + [f"Left out, since {why}: {', '.join(of)}." for why, of in left_out.items()]
    )


def _same_lengths(row: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether both have as many tokens a sample, as the same data has; a run that ended early does not know them."""
    if not result["tokens"] or not row["tokens"]:
        return True
    return bool(row["tokens"] * result["samples"] == result["tokens"] * row["samples"])


def _other_run(plan: Plan, row: dict[str, Any], result: dict[str, Any]) -> str | None:
    """Why a row does not predict a run of the same combination, if it does not."""
    if None not in (sizes := (result["total_params"], row["total_params"])) and sizes[0] != sizes[1]:
        return f"the model has {sizes[0]:,} parameters in the sweep, {sizes[1]:,} in the plan"
    on = [name for name, is_on in row["optim"].items() if is_on]
    measured = {"training.micro_batch_size": result["micro_batch_size"]} | flat(
        {n: result["techniques"].get(n, {}) for n in on}
    )
    planned = {"training.micro_batch_size": plan["training"]["micro_batch_size"]} | flat(
        {n: plan["techniques"][n] for n in on}
    )
    for key in (key for key in measured if key in planned):
        values = measured[key], planned[key]
        if values[0] != values[1] and "auto" not in values:
            return f"{key} is {values[0]} in the sweep, {values[1]} in the plan"
    return None


def gpu_of(plan: Plan, group: Group) -> dict[str, Any] | None:
    """The planned card that a group's runs belong to: the one of their profile; else of their device; else the only
    one of its kind, CUDA or CPU.
    """
    on_cuda = is_on_cuda(group)
    kind = [gpu for gpu in plan["gpus"] if on_cuda is None or (gpu["device"] == "cuda") == on_cuda]
    named = [gpu for gpu in kind if gpu["name"] == group.results[0]["gpu"]]
    alike = [gpu for gpu in kind if is_device(gpu, group)]
    return next((found[0] for found in (named, alike, kind) if len(found) == 1), None)


def is_on_cuda(group: Group) -> bool | None:
    """Whether runs were on CUDA, which alone reserves memory; None where no run got as far."""
    reserved = [r["peak_memory_reserved_mib"] is not None for r in group.results if r["status"] == "ok"]
    return any(reserved) if reserved else None


def is_device(gpu: dict[str, Any], group: Group) -> bool:
    """Whether a profile is of the very device that a group ran on, going by its name: `rtx4090_24gb` of `NVIDIA
    GeForce RTX 4090`. A run with a smaller card's profile has that card's memory and this device's times.
    """
    if gpu["device"] != "cuda":
        return is_on_cuda(group) is False
    device = next((r["device"] for r in group.results if r["device"]), None)
    return device is not None and letters(re.sub(r"_\d+gb$", "", gpu["name"])) in letters(device)


def letters(name: str) -> str:
    """A name without what people write differently."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
