"""Which runs are compared, of two sweeps or of a sweep and the plan that predicts it; how their settings differ."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from llama_ft.config import TrainConfig
from llama_ft.config.checks import Settings, flat, readable
from llama_ft.config.training import SEED
from llama_ft.records.plan import Plan
from llama_ft.records.result import CONFIG_FILE, Result, ran_on
from llama_ft.reporting.results import Group, planned_group, seeds_text
from llama_ft.reporting.table import by_reason

# The combination is the table's column; the others are how a run is kept, watched and supplied, or which of the model's
# sizes were typed: not what is run.
NOT_COMPARED = (
    "optim.",
    "tracker.",
    "data.cache_dir",
    "training.save_every",
    "training.resume",
    "sweep.",
    "hydra.",
    "model.given",
)
# What changes the memory and time of each run, whatever its combination.
OF_EVERY_RUN = tuple(
    f"training.{key}" for key in ("micro_batch_size", "packing", "optimizer", "optimizer_in_backward", "momentum")
)
ALIKE = ("settings_hash", "device", "gpu")  # what the runs of two groups had better share

Difference = tuple[str, str, str]  # a setting, its value in the one and in the other


def match_sweeps(first: list[Group], second: list[Group]) -> tuple[list[tuple[Group, Group]], list[str]]:
    """Groups of the same model, data and variation, cut down to what both have; notes on what one side alone has."""
    pairs = [(a, b) for a in first for b in second if subject(a) == subject(b) and _names(a).keys() & _names(b)]
    # Of several, a group is compared with the one whose settings and device are the same.
    pairs.sort(key=_likeness, reverse=True)
    partners: dict[int, Group] = {}  # by the id of a group, on both sides
    for a, b in pairs:
        if id(a) not in partners and id(b) not in partners:
            partners |= {id(a): b, id(b): a}
    notes = [
        f"Only in {side}: {subject(group)}: {', '.join(missing)}"
        for side, groups in (("A", first), ("B", second))
        for group in groups
        if (missing := only_in(group, partners.get(id(group))))
    ]
    return [common(a, partners[id(a)]) for a in first if id(a) in partners], notes


def subject(group: Group) -> str:
    """What a group is of, whatever it ran on."""
    return " · ".join(filter(None, (group.results[0].model, group.results[0].data, group.variant)))


def _likeness(pair: tuple[Group, Group]) -> list[bool]:
    sides = [[{getattr(r, key) for r in group.results} - {None} for key in ALIKE] for group in pair]
    return [bool(a & b) for a, b in zip(*sides, strict=True)]


def _names(group: Group) -> dict[str, int]:
    """The index of each combination; of one that a group has more than once, as in copied folders, the last."""
    return {result.combination: index for index, result in enumerate(group.results)}


def only_in(group: Group, other: Group | None) -> list[str]:
    """The combinations that a group has and another has not."""
    return [name for name in _names(group) if other is None or name not in _names(other)]


def common(a: Group, b: Group, without: list[str] | None = None) -> tuple[Group, Group]:
    """Two groups cut down to the combinations that both have, in the same order."""
    names = [name for name in _names(a) if name in _names(b) and name not in (without or [])]
    cut = []
    for group in (a, b):
        indices = [_names(group)[name] for name in names]
        folders = [group.folders[index] for index in indices] if group.folders else []
        cut.append(Group(group.variant, [group.results[index] for index in indices], folders))
    return cut[0], cut[1]


def match_plan(plan: Plan, group: Group) -> tuple[Group, Group, Settings, list[Difference], list[str]] | str:
    """Why no rows of a plan predict a group; or the group, the rows, their card, the settings that are not the same,
    and notes on what is left out.
    """
    first, gpu = group.results[0], card_of(plan, group)
    if (first.model, first.data) != (plan.model, plan.data.name):
        return f"{group.title}: the plan is of {plan.model} on {plan.data.name}"
    if gpu is None:
        return f"{group.title}, gpu={first.gpu}: the plan is of {', '.join(card['name'] for card in plan.gpus)}"
    rows = planned_group(plan, gpu, group.variant)
    # Of a plan's versions PyTorch's alone matters.
    planned_settings = {**plan.techniques, "training": plan.training, "gpu": gpu, "torch": plan.versions.get("torch")}
    settings = differing_settings(group_settings(group), flat(planned_settings))
    sides = (("Measured", only_in(group, rows)), ("Predicted", only_in(rows, group)))
    notes = [f"{side} alone: {', '.join(missing)}." for side, missing in sides if missing]
    alike = zip(*(side.results for side in common(group, rows)), strict=True)
    other = by_reason((why, a.combination) for a, b in alike if (why := _other_run(a, b, settings)))
    notes += [f"Left out, since {reason}: {', '.join(names)}." for reason, names in other.items()]
    measured, planned = common(group, rows, without=[name for names in other.values() for name in names])
    if not measured.results:
        return f"{group.title}: {' '.join(notes)}"
    return measured, planned, gpu, settings, notes


def _other_run(measured: Result, planned: Result, settings: list[Difference]) -> str | None:
    """Why a row does not predict a run of the same combination, if it does not."""
    sizes = measured.total_params, planned.total_params
    if None not in sizes and sizes[0] != sizes[1]:
        return f"the model has {sizes[0]:,} parameters in the sweep, {sizes[1]:,} in the plan"
    for key, a, b in settings:
        is_of_run = key in OF_EVERY_RUN or planned.optim.get(key.partition(".")[0])
        if is_of_run and "auto" not in (a, b):
            return f"{key} is {a} in the sweep, {b} in the plan"
    return None


def card_of(plan: Plan, group: Group) -> Settings | None:
    """The planned card that runs belong to: that of their profile, else of their device, else the only CUDA or CPU."""
    finished = any(result.status == "ok" for result in group.results)
    kind = [gpu for gpu in plan.gpus if not finished or (gpu["device"] == "cuda") == group.on_cuda]
    named = [gpu for gpu in kind if gpu["name"] == group.results[0].gpu]
    alike = [gpu for gpu in kind if is_device(gpu, group)]
    return next((cards[0] for cards in (named, alike, kind) if len(cards) == 1), None)


def is_device(gpu: Settings, group: Group) -> bool:
    """Whether a profile is of the very device that a group ran on, whose times a run with a smaller card's has too."""
    on_cuda = gpu["device"] == "cuda"
    return any(ran_on(result, gpu["name"], on_cuda) for result in group.results if result.status == "ok")


def differing_settings(a: Settings, b: Settings) -> list[Difference]:
    """Each setting that both have and that differs, in the order of their names."""
    both = sorted(a.keys() & b.keys())
    keys = varied([{key: side[key] for key in both} for side in (a, b)])
    return [(key, as_typed(a[key]), as_typed(b[key])) for key in keys]


def varied(configs: Sequence[Settings]) -> list[str]:
    """The settings that differ; of a model, data set or card with another name, what is not said by the name."""

    def differ(key: str, among: Sequence[Settings]) -> bool:
        return len({as_typed(config.get(key)) for config in among}) > 1

    all_keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(NOT_COMPARED))
    keys = [key for key in all_keys if differ(key, configs)]
    for section in ("model", "data", "gpu"):
        if (name := f"{section}.name") in keys:
            alike: dict[Any, list[Settings]] = {}
            for config in configs:
                alike.setdefault(config.get(name), []).append(config)
            follows = {key for key in keys if key != name and not any(differ(key, part) for part in alike.values())}
            keys = [key for key in keys if not (key.startswith(f"{section}.") and key in follows)]
    return keys


def as_typed(value: Any) -> str:
    """A value as in a YAML file: null, true, [wq, wv]; texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def group_settings(group: Group) -> Settings:
    """A group's settings, device and versions by full name: from the file of a run, or what a result has of them."""
    first, versions = group.results[0], next((result.versions for result in group.results if result.versions), {})
    training = {"micro_batch_size": first.micro_batch_size, "packing": first.packing}
    limit = {"memory_limit_mib": group.memory_limit_mib}
    known = flat({**first.techniques, "training": training, "gpu": {"name": first.gpu}, "measure": limit})
    settings = next(filter(None, map(run_settings, group.folders)), known)
    seeds = {SEED: seeds_text(group.seeds)} if group.seeds else {}
    return settings | seeds | {"device": group.device} | versions


@cache
def defaults() -> Settings:
    """What a key is that a run of an earlier version did not know."""
    schema: Any = OmegaConf.to_container(OmegaConf.structured(TrainConfig), enum_to_str=True)
    return {key: value for key, value in flat(schema).items() if value != "???"}


def run_settings(folder: Path) -> Settings | None:
    """A run's settings by full name; None of one that was refused before it began. A UserError if they are damaged."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    with readable(file):
        settings: Settings = flat(yaml.safe_load(file.read_bytes()))
        return settings | {key: value for key, value in defaults().items() if key not in settings}
