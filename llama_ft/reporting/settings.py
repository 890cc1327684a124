"""Which settings, devices and versions of two groups of runs are not the same."""

import json
from typing import Any

from omegaconf import OmegaConf

from llama_ft.config import UserError
from llama_ft.records.result import CONFIG_FILE
from llama_ft.reporting.results import Group, limit_of

SAME_SETTINGS = "Settings, device and versions are the same."
ABSENT = "absent"
# The combination is the table's column; the others are how a run is kept, watched and supplied, not what is run.
NOT_COMPARED = ("optim.", "tracker.", "data.cache_dir", "training.save_every", "training.resume", "hydra.")

Difference = tuple[str, str, str]  # a setting, its value in A and in B


def differing_settings(a: Group, b: Group) -> list[Difference]:
    """Each setting, the device, and each version that differ, once, in the order of their names."""
    sides = [_config(group) for group in (a, b)]
    if None in sides:  # a file is missing: compare what every result holds
        sides = [_settings_of_result(group) for group in (a, b)]
    known = [(settings or {}) | _environment(group) for settings, group in zip(sides, (a, b), strict=True)]
    differing = [
        (key, _shown(known[0].get(key, ABSENT)), _shown(known[1].get(key, ABSENT)))
        for key in sorted(known[0].keys() | known[1].keys())
        if known[0].get(key, ABSENT) != known[1].get(key, ABSENT)
    ]
    # What a card has is in its profile's name already.
    named = any(key == "gpu.name" for key, *_ in differing)
    return [line for line in differing if not (named and line[0].startswith("gpu.") and line[0] != "gpu.name")]


def _config(group: Group) -> dict[str, Any] | None:
    """The settings of a group by full name, from the first run's file; the others' differ in their techniques alone."""
    file = next((folder / CONFIG_FILE for folder in group.folders if (folder / CONFIG_FILE).is_file()), None)
    if file is None:
        return None
    try:
        settings = flat(OmegaConf.to_container(OmegaConf.load(file)))
    except Exception as error:  # whatever a damaged file makes the parser say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read: {reason}") from error
    return {key: value for key, value in settings.items() if not key.startswith(NOT_COMPARED)}


def _settings_of_result(group: Group) -> dict[str, Any]:
    result = group.results[0]
    known = {"training": {"micro_batch_size": result["micro_batch_size"]}, "gpu": {"name": result["gpu"]}}
    return flat({**result["techniques"], **known, "memory_limit_mib": limit_of(group.results)})


def _environment(group: Group) -> dict[str, Any]:
    measured = next((r for r in group.results if r["versions"]), group.results[0])
    device = next((r["device"] for r in group.results if r["device"]), None)
    return {"device": device} | (measured["versions"] or {})


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by full name: `{"lora": {"rank": 16}}` as `{"lora.rank": 16}`."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    return {k: v for key, value in settings.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def _shown(value: Any) -> str:
    """As in a YAML file: null, true, [wq, wv]; texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
