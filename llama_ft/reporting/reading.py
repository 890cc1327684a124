"""The runs below a folder in groups that share a table, with repeats under several seeds as one result."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from llama_ft.config import SEED, UserError
from llama_ft.config.techniques import table_order
from llama_ft.records.result import RESULT_FILE, results_below
from llama_ft.reporting.repeats import Run, repeated
from llama_ft.reporting.results import Group
from llama_ft.reporting.settings import NOT_COMPARED, run_settings


def read_groups(folder: Path) -> list[Group]:
    """The results in a folder and in the folders below it; a UserError if there are none, or one cannot be read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    runs: list[tuple[tuple[str, ...], Run]] = []  # each after its subject
    for run_dir, result in results_below(folder).items():
        run = run_dir.relative_to(folder)
        # Runs in different folders are different sweeps.
        variant = ", ".join(filter(None, (run.parent.as_posix().removeprefix("."), run.name.partition(",")[2])))
        runs.append(((variant, result.model, result.data, result.gpu), Run(result, run_dir)))
    if not runs:
        raise UserError(f"{folder}: there is no {RESULT_FILE} in it or below it; is it the folder of a sweep?")
    # A run that was refused before it began has no hash: it stays with the others of its sweep.
    began = {subject: run.result.settings_hash for subject, run in reversed(runs) if run.result.config_hash}
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for subject, each in runs:
        settings = each.result.settings_hash if each.result.config_hash else began.get(subject)
        groups.setdefault((*subject, settings), []).append(each)
    sweeps: dict[Path, list[Group]] = {}
    for (variant, *_), alike in groups.items():
        for part in _by_device(sorted(alike, key=lambda run: table_order(run.result.optim))):
            sweeps.setdefault(part[0].folder.parent, []).append(Group(variant, part))
    return [group for parts in sweeps.values() for group in (_with_repeats(parts) if len(parts) > 1 else parts)]


def _by_device(runs: list[Run]) -> list[list[Run]]:
    """Separate runs by device, if a sweep was resumed on another machine. Runs without a device stay with the first."""
    devices: list[str | None] = list(dict.fromkeys(run.result.device for run in runs if run.result.device)) or [None]
    return [[run for run in runs if (run.result.device or devices[0]) == device] for device in devices]


def _with_repeats(groups: list[Group]) -> list[Group]:
    """A sweep's groups, with runs that differ only in their seed as one result; unchanged if there are none."""
    known = [(group, next(filter(None, (run_settings(row.folder) for row in group.rows)), None)) for group in groups]
    alike: dict[str, list[Run]] = {}  # by all settings but the seed
    variants: dict[str, list[str]] = {}  # by the same
    subjects: dict[str, str] = {}  # by a variant without its seed: a refused run left no settings
    for group, settings in sorted(known, key=lambda each: each[1] is None):
        variant = _common([group.variant])
        compared = {k: v for k, v in (settings or {}).items() if k != SEED and not k.startswith(NOT_COMPARED)}
        subject = json.dumps(compared, sort_keys=True, default=str) if settings else subjects.get(variant, variant)
        subjects.setdefault(variant, subject)
        seed = settings.get(SEED) if settings else _named_seed(group.variant)
        alike.setdefault(subject, []).extend(row._replace(seed=seed) for row in group.rows)
        variants.setdefault(subject, []).append(group.variant)
    rows = [(subject, run.result.combination, run.seed) for subject, runs in alike.items() for run in runs]
    are_repeats = len(set(rows)) == len(rows) and None not in {seed for *_, seed in rows}
    if not are_repeats or max(Counter(row[:2] for row in rows).values()) == 1:
        return groups
    return [
        _group_of_repeats(_common(variants[subject]), part)
        for subject, runs in alike.items()
        for part in _by_device(runs)
    ]


def _group_of_repeats(variant: str, runs: list[Run]) -> Group:
    rows: dict[str, list[Run]] = {}  # by combination
    for run in sorted(runs, key=lambda run: table_order(run.result.optim)):
        rows.setdefault(run.result.combination, []).append(run)
    # The folder of a refused run has no settings.
    known = [next((run for run in row if run.result.config_hash), row[0]) for row in rows.values()]
    return Group(variant, [Run(repeated(row), one.folder) for row, one in zip(rows.values(), known, strict=True)])


def _named_seed(variant: str) -> int | str | None:
    named = re.search(rf"\b{SEED}=([^,]*)", variant)
    return None if named is None else int(named[1]) if re.fullmatch(r"-?\d+", named[1]) else named[1]


def _common(variants: list[str]) -> str:
    """The parts that variants have in common, without the seed, even for a single one."""
    first, *others = (variant.split(",") for variant in variants)
    shared = [part for part in first if all(part in other for other in others)]
    return ",".join(part for part in shared if not part.strip().startswith(f"{SEED}="))
