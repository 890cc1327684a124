"""Runs that share a table, and the rows of a plan in the same form."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from llama_ft.config.checks import Settings
from llama_ft.config.techniques import BASELINE, combination_label
from llama_ft.records.plan import Plan, PlanRow
from llama_ft.records.result import Result
from llama_ft.reporting.repeats import Run, runs_of
from llama_ft.reporting.settings import RECIPE, as_typed, varied
from llama_ft.reporting.table import UNKNOWN

TECHNIQUES_COLUMN, DEVICE = "techniques", "device"  # columns besides those of settings
LONGEST_SETTING = 32  # characters of one in a label
MOST_SEEDS = 10  # in a title

Record = TypeVar("Record", Result, PlanRow)
SHARED = {field.name for field in fields(Result)} & {field.name for field in fields(PlanRow)}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their techniques, in the order of the course's Table 2."""

    variant: str  # what else the sweep varied, from the folders' names; often empty
    rows: list[Run]  # repeats are one, whose result is `Repeated`
    settings: list[dict[str, str]] = field(default_factory=list)  # of each row, if more than techniques vary
    values: list[Settings] = field(default_factory=list)  # then all in which rows differ, by full name, recipes' too

    @property
    def results(self) -> list[Result]:
        """The results of the rows."""
        return [row.result for row in self.rows]

    @property
    def runs(self) -> list[tuple[int, Run]]:
        """Every run, repeats one by one, with the number of its row."""
        return [(number, run) for number, row in enumerate(self.rows) for run in runs_of(row.result, row.folder)]

    @property
    def seeds(self) -> list[int | str]:
        """The seeds of the repeats, in order; empty if nothing is repeated."""
        seeds = {run.seed for _, run in self.runs if run.seed is not None}
        return sorted(seeds, key=lambda seed: (isinstance(seed, str), seed))

    @property
    def device(self) -> str | None:
        """The device that the runs were on, if one of them knows it."""
        return next((result.device for result in self.results if result.device), None)

    @property
    def memory_limit_mib(self) -> int | None:
        """The runs' memory limit; for a plan's rows, the memory that the allocator can use on the card."""
        limits = {r.memory_limit_mib for r in self.results} - {None}
        return limits.pop() if len(limits) == 1 else None

    @property
    def on_cuda(self) -> bool:
        """True if memory was reserved, which only the CUDA allocator does."""
        return any(result.peak_memory_reserved_mib for result in self.results)

    @property
    def title(self) -> str:
        """The properties that all runs of the group have in common."""
        model, data, samples, device, gpu = map(self._common, ("model", "data", "samples", "device", "gpu"))
        place = device or (None if self.device else gpu)
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}: {seeds_text(self.seeds)}" if self.seeds else None
        parts = [model, data and f"{data}{f', {samples} samples' if samples else ''}", place, self.variant, seeds]
        return " · ".join(part for part in parts if part)

    @property
    def labels(self) -> list[str]:
        """Unique labels of the runs: their techniques, or settings."""
        if not self.settings:
            return [combination_label(result.optim) for result in self.results]
        plain = (TECHNIQUES_COLUMN, DEVICE, RECIPE)
        names = {key: "" if key in plain else f"{key.rpartition('.')[2]}=" for key in self.settings[0]}
        return [", ".join(names[key] + _end(text) for key, text in settings.items()) for settings in self.settings]

    def _common(self, key: str) -> Any:
        """The value of a field if all runs that have one share it, else None."""
        values = {getattr(run.result, key) for _, run in self.runs} - {None}
        return values.pop() if len(values) == 1 else None


def seeds_text(seeds: Sequence[int | str]) -> str:
    """Seeds in a line; of more than a few, the first and the last."""
    shown = seeds if len(seeds) <= MOST_SEEDS else [seeds[0], "…", seeds[-1]]
    return ", ".join(map(str, shown))


def _end(text: str) -> str:
    """A setting, shortened for a label: the end of a long one, such as a path, tells most."""
    return text if len(text) <= LONGEST_SETTING else f"…{text[1 - LONGEST_SETTING :]}"


def setting_columns(rows: Sequence[Run], values: Sequence[Settings]) -> list[dict[str, str]]:
    """Columns of a table in which runs differ: techniques, settings, device; of a recipe only its name."""
    keys, results = varied(values), [row.result for row in rows]
    labels, devices = [combination_label(result.optim) for result in results], {r.device for r in results} - {None}
    said = [values[n].get(RECIPE) for n in range(len(results))] if RECIPE in keys else labels[:1] * len(labels)
    has_techniques = len(set(zip(said, labels, strict=True))) > len(set(said))
    return [
        ({TECHNIQUES_COLUMN: label} if has_techniques else {})
        | {key: as_typed(own.get(key)) for key in keys}
        | ({DEVICE: result.device or UNKNOWN} if len(devices) > 1 else {})
        for result, label, own in zip(results, labels, values, strict=True)
    ]


def baseline_of(records: Sequence[Record]) -> Record | None:
    """The record with every technique off, if it finished."""
    return next((record for record in records if record.combination == BASELINE and record.status == "ok"), None)


def value_of(record: Result | PlanRow, key: str) -> Any:
    """A value of a run that finished, or of a planned one even if it would not fit; else None."""
    is_whole = record.status == "ok" or (record.status == "oom" and record.peak_memory_mib is not None)
    return getattr(record, key) if is_whole else None


def planned_group(plan: Plan, gpu: Settings, variant: str = "", rows: Sequence[PlanRow] | None = None) -> Group:
    """A card's rows of a plan, or the given ones, as results; one that does not fit is `oom`, and has its numbers."""
    rows = plan.rows_on(gpu["name"]) if rows is None else rows
    runs, values = [Run(_planned(plan, row, gpu)) for row in rows], [row.settings for row in rows]
    return Group(variant, runs, setting_columns(runs, values), values) if any(values) else Group(variant, runs)


def _planned(plan: Plan, row: PlanRow, gpu: Settings) -> Result:
    own = plan.settings_of(row)
    return Result(
        model=plan.model,
        data=plan.data.name,
        techniques={name: own[name] for name in plan.techniques},
        micro_batch_size=own["training"]["micro_batch_size"],
        packing=own["training"].get("packing"),
        command=plan.command,
        status="oom" if row.fits is False else row.status,
        memory_limit_mib=None if gpu["memory_mib"] is None else gpu["memory_mib"] - gpu["context_mib"],
        peak_memory_reserved_mib=row.reserved_mib,
        **{key: getattr(row, key) for key in SHARED},
    )
