"""The results of a sweep's folder, in the order of the course's Table 2."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ft.config import UserError
from llama_ft.records.result import RESULT_FILE, read_result

COURSE = ("ga", "mp", "lora")  # of the course's table; the others have a row where a run has them on
TECHNIQUES = (*COURSE, "gc")
LABELS = {"ga": "GA", "mp": "MP", "lora": "LoRA", "gc": "GC"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their techniques alone, and so may share a table."""

    variant: str  # what else the sweep varied, from the folders' names; often empty
    results: list[dict[str, Any]]
    folders: list[Path]  # of the runs, in the order of their results

    @property
    def baseline(self) -> dict[str, Any] | None:
        """The run with every technique off, if it finished."""
        return next((r for r in self.results if r["combination"] == "baseline" and r["status"] == "ok"), None)

    @property
    def title(self) -> str:
        """What all runs of the group have in common."""
        first = self.results[0]
        device = next((r["device"] for r in self.results if r["device"]), None)
        samples = next((f", {r['samples']} samples" for r in self.results if r["samples"]), "")
        parts = [first["model"], f"{first['data']}{samples}", device or first["gpu"], self.variant]
        return " · ".join(part for part in parts if part)


def read_groups(folder: Path) -> list[Group]:
    """The results in a folder and in the folders below it.

    Raises:
        UserError: if there are none, or one cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    found: list[tuple[tuple[str, ...], dict[str, Any], Path]] = []
    for file in sorted(folder.rglob(RESULT_FILE)):
        run = file.parent.relative_to(folder)
        # W&B keeps a copy with its own files.
        result = None if "wandb" in run.parts else read_result(file.parent)
        if result is None:
            continue
        result["optim"] = dict.fromkeys(TECHNIQUES, False) | result["optim"]  # an earlier version may have had fewer
        # Runs in folders of their own are sweeps of their own.
        variant = ", ".join(filter(None, (run.parent.as_posix().removeprefix("."), run.name.partition(",")[2])))
        found.append(((variant, result["model"], result["data"], result["gpu"]), result, file.parent))
    if not found:
        raise UserError(f"{folder}: there is no {RESULT_FILE} in it or below it; is it the folder of a sweep?")
    # A run that was refused before it began has no hash: it stays with the others of its sweep.
    began = {subject: result.get("settings_hash") for subject, result, _ in reversed(found) if result["config_hash"]}
    groups: dict[tuple[Any, ...], list[tuple[dict[str, Any], Path]]] = {}
    for subject, result, run_dir in found:
        settings = result.get("settings_hash") if result["config_hash"] else began.get(subject)
        groups.setdefault((*subject, settings), []).append((result, run_dir))
    return [_group(key[0], part) for key, runs in groups.items() for part in _by_device(runs)]


def _group(variant: str, runs: list[tuple[dict[str, Any], Path]]) -> Group:
    runs = sorted(runs, key=lambda run: _course_order(run[0]))
    return Group(variant, [result for result, _ in runs], [folder for _, folder in runs])


def _by_device(runs: list[tuple[dict[str, Any], Path]]) -> list[list[tuple[dict[str, Any], Path]]]:
    """Apart where a sweep went on on another machine. A run that never came to know its device stays with the first."""
    devices = list(dict.fromkeys(result["device"] for result, _ in runs if result["device"])) or [None]
    return [[run for run in runs if (run[0]["device"] or devices[0]) == device] for device in devices]


def _course_order(result: dict[str, Any]) -> tuple[bool, ...]:
    return tuple(result["optim"][name] for name in (*TECHNIQUES[len(COURSE) :], *COURSE))


def label(result: dict[str, Any]) -> str:
    """The combination for people: `GA+MP+LoRA`."""
    return "+".join(LABELS[name] for name in TECHNIQUES if result["optim"][name]) or "baseline"


def limit_of(results: list[dict[str, Any]]) -> int | None:
    """The memory limit in MiB that the runs of a group had."""
    return next((r["memory_limit_mib"] for r in results if r["memory_limit_mib"] is not None), None)
