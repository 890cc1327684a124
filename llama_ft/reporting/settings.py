"""Which settings, devices and versions of two groups of runs are not the same."""

import json
from typing import Any

from omegaconf import OmegaConf

from llama_ft.config import UserError
from llama_ft.config.checks import Settings
from llama_ft.records.plan import Plan
from llama_ft.records.result import CONFIG_FILE
from llama_ft.reporting.results import Group

# The combination is the table's column; the others are how a run is kept, watched and supplied, not what is run.
NOT_COMPARED = ("optim.", "tracker.", "data.cache_dir", "training.save_every", "training.resume", "hydra.")

Difference = tuple[str, str, str]  # a setting, its value in the one and in the other


def differing_settings(a: Settings, b: Settings) -> list[Difference]:
    """Each setting that both have and that differs, in the order of their names."""
    keys = sorted(key for key in a.keys() & b.keys() if a[key] != b[key] and not key.startswith(NOT_COMPARED))
    # What a card has is in its profile's name already.
    other_card = "gpu.name" in keys
    return [
        (key, _shown(a[key]), _shown(b[key]))
        for key in keys
        if not (other_card and key.startswith("gpu.") and key != "gpu.name")
    ]


def group_settings(group: Group) -> Settings:
    """A group's settings, device and versions by full name: from the file of a run, or what a result has of them.

    The runs' settings differ in their techniques alone.
    """
    versions = next((result.versions for result in group.results if result.versions), {})
    environment = {"device": group.device} | versions
    file = next((folder / CONFIG_FILE for folder in group.folders if (folder / CONFIG_FILE).is_file()), None)
    if file is None:
        result = group.results[0]
        known = {"training": {"micro_batch_size": result.micro_batch_size}, "gpu": {"name": result.gpu}}
        limit = {"measure": {"memory_limit_mib": group.memory_limit_mib}}
        return flat({**result.techniques, **known, **limit}) | environment
    try:
        return flat(OmegaConf.to_container(OmegaConf.load(file))) | environment
    except Exception as error:  # whatever a damaged file makes the parser say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read: {reason}") from error


def plan_settings(plan: Plan, gpu: Settings) -> Settings:
    """The same of a plan, of whose versions PyTorch's alone matters."""
    return flat({**plan.techniques, "training": plan.training, "gpu": gpu, "torch": plan.versions.get("torch")})


def flat(settings: Any, prefix: str = "") -> Settings:
    """Nested settings by full name: `{"lora": {"rank": 16}}` as `{"lora.rank": 16}`."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    return {k: v for key, value in settings.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def _shown(value: Any) -> str:
    """As in a YAML file: null, true, [wq, wv]; texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
