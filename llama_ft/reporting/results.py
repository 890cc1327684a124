"""Runs that share a table: those of a sweep's folder, and the rows of a plan in their form."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from llama_ft.config import UserError
from llama_ft.config.checks import Settings
from llama_ft.config.techniques import BASELINE, combination_label, table_order
from llama_ft.records.plan import Plan, PlanRow
from llama_ft.records.result import RESULT_FILE, Result, read_result

TECHNIQUES_COLUMN, DEVICE = "techniques", "device"  # columns beside those of settings
LONGEST_SETTING = 32  # characters of it in a label

Run = tuple[Result, Path]  # a result and its folder
Record = TypeVar("Record", Result, PlanRow)
SHARED = {field.name for field in fields(Result)} & {field.name for field in fields(PlanRow)}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their techniques alone, in the order of the course's Table 2."""

    variant: str  # what else the sweep varied, from the folders' names; often empty
    results: list[Result]
    folders: list[Path]  # of the runs, in the order of their results; none of a plan's rows
    settings: list[dict[str, str]] = field(default_factory=list)  # of each run, where more than techniques vary

    @property
    def device(self) -> str | None:
        """The device that the runs were on, where one came to know it."""
        return next((result.device for result in self.results if result.device), None)

    @property
    def memory_limit_mib(self) -> int | None:
        """The limit that the runs had; of a plan's rows, what the allocator can have on the card."""
        limits = {r.memory_limit_mib for r in self.results} - {None}
        return limits.pop() if len(limits) == 1 else None

    @property
    def on_cuda(self) -> bool:
        """Whether memory was reserved, which the CUDA allocator alone does."""
        return any(result.peak_memory_reserved_mib for result in self.results)

    @property
    def title(self) -> str:
        """What all runs of the group have in common."""
        model, data, samples, device, gpu = map(self._common, ("model", "data", "samples", "device", "gpu"))
        place = device or (None if self.device else gpu)
        parts = [model, data and f"{data}{f', {samples} samples' if samples else ''}", place, self.variant]
        return " · ".join(part for part in parts if part)

    @property
    def labels(self) -> list[str]:
        """What tells the runs apart: their techniques, or settings."""
        if not self.settings:
            return [combination_label(result.optim) for result in self.results]
        names = {
            key: "" if key in (TECHNIQUES_COLUMN, DEVICE) else f"{key.rpartition('.')[2]}=" for key in self.settings[0]
        }
        return [", ".join(names[key] + _end(text) for key, text in settings.items()) for settings in self.settings]

    def _common(self, key: str) -> Any:
        """The value of a field that all runs share that have one, else None."""
        values = {getattr(result, key) for result in self.results} - {None}
        return values.pop() if len(values) == 1 else None


def _end(text: str) -> str:
    """A setting as a label has room for it: of a long one, such as a path, the end tells most."""
    return text if len(text) <= LONGEST_SETTING else f"…{text[1 - LONGEST_SETTING :]}"


def baseline_of(records: Sequence[Record]) -> Record | None:
    """The one with every technique off, if it finished."""
    return next((record for record in records if record.combination == BASELINE and record.status == "ok"), None)


def value_of(record: Result | PlanRow, key: str) -> Any:
    """What is known of a run that finished, or of a planned one although it would not fit; else None."""
    is_whole = record.status == "ok" or (record.status == "oom" and record.peak_memory_mib is not None)
    return getattr(record, key) if is_whole else None


def read_groups(folder: Path) -> list[Group]:
    """The results in a folder and in the folders below it.

    Raises:
        UserError: if there are none, or one cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    runs: list[tuple[tuple[str, ...], Result, Path]] = []  # each after what it is a run of
    for file in sorted(folder.rglob(RESULT_FILE)):
        run = file.parent.relative_to(folder)
        # W&B keeps a copy with its own files.
        result = None if "wandb" in run.parts else read_result(file.parent)
        if result is None:
            continue
        # Runs in folders of their own are sweeps of their own.
        variant = ", ".join(filter(None, (run.parent.as_posix().removeprefix("."), run.name.partition(",")[2])))
        runs.append(((variant, result.model, result.data, result.gpu), result, file.parent))
    if not runs:
        raise UserError(f"{folder}: there is no {RESULT_FILE} in it or below it; is it the folder of a sweep?")
    # A run that was refused before it began has no hash: it stays with the others of its sweep.
    began = {subject: result.settings_hash for subject, result, _ in reversed(runs) if result.config_hash}
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for subject, result, run_dir in runs:
        settings = result.settings_hash if result.config_hash else began.get(subject)
        groups.setdefault((*subject, settings), []).append((result, run_dir))
    return [
        Group(key[0], [result for result, _ in part], [run_dir for _, run_dir in part])
        for key, alike in groups.items()
        for part in _by_device(sorted(alike, key=lambda run: table_order(run[0].optim)))
    ]


def _by_device(runs: list[Run]) -> list[list[Run]]:
    """Apart where a sweep went on on another machine. A run that never came to know its device stays with the first."""
    devices: list[str | None] = list(dict.fromkeys(result.device for result, _ in runs if result.device)) or [None]
    return [[run for run in runs if (run[0].device or devices[0]) == device] for device in devices]


def planned_group(plan: Plan, gpu: Settings, variant: str = "") -> Group:
    """A card's rows of a plan as results. A row that does not fit is out of memory, and has numbers all the same."""
    limit = None if gpu["memory_mib"] is None else gpu["memory_mib"] - gpu["context_mib"]
    results = [
        Result(
            model=plan.model,
            data=plan.data.name,
            techniques=plan.techniques,
            micro_batch_size=plan.training["micro_batch_size"],
            packing=plan.training.get("packing"),
            command=plan.command,
            status="oom" if row.fits is False else row.status,
            memory_limit_mib=limit,
            peak_memory_reserved_mib=row.reserved_mib,
            **{key: getattr(row, key) for key in SHARED},
        )
        for row in plan.rows_on(gpu["name"])
    ]
    return Group(variant, results, [])
