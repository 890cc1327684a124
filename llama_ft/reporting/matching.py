"""The runs to compare in two sweeps, or in a sweep and the plan that predicts it, and their differing settings."""

from typing import Any

from llama_ft.config.checks import Settings, flat
from llama_ft.config.training import SEED
from llama_ft.records.plan import Plan, PlanRow, row_key
from llama_ft.records.result import Result, ran_on
from llama_ft.reporting.results import Group, planned_group, seeds_text, setting_columns
from llama_ft.reporting.settings import RECIPE, as_typed, run_settings, varied
from llama_ft.reporting.table import by_reason

# Keys of training that change the memory and time of each run, whatever its combination.
KEYS_OF_EVERY_RUN = "micro_batch_size packing optimizer optimizer_in_backward momentum".split()
OF_EVERY_RUN = [f"training.{key}" for key in KEYS_OF_EVERY_RUN]
ALIKE = ("settings_hash", "device", "gpu")  # preferably shared by the runs of two groups

Difference = tuple[str, str, str]  # a setting, its value in the one and in the other
# A group, the rows that predict it, their card, the settings that are not the same, and notes on what is left out.
Match = tuple[Group, Group, Settings, list[Difference], list[str]]


def match_sweeps(first: list[Group], second: list[Group]) -> tuple[list[tuple[Group, Group]], list[str]]:
    """Groups of the same model, data and variation, cut down to what both have; notes on what only one side has."""
    pairs = [(a, b) for a in first for b in second if subject(a) == subject(b) and _names(a).keys() & _names(b)]
    # Of several, a group is compared with one of the same settings and device.
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
    """A group's model, data and variation, whatever it ran on."""
    return " · ".join(filter(None, (group.results[0].model, group.results[0].data, group.variant)))


def _likeness(pair: tuple[Group, Group]) -> list[bool]:
    sides = [[{getattr(r, key) for r in group.results} - {None} for key in ALIKE] for group in pair]
    return [bool(a & b) for a, b in zip(*sides, strict=True)]


def _names(group: Group) -> dict[str, int]:
    """The index of each combination; the last one if there are several, as in copied folders."""
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
        values = [group.values[index] for index in indices] if group.values else []
        cut.append(Group(group.variant, [group.rows[index] for index in indices], values=values))
    return cut[0], cut[1]


def match_plan(plan: Plan, group: Group) -> Match | str:
    """The group, the rows that predict it, their card, settings that differ and notes; or why no rows predict it."""
    first, gpu = group.results[0], card_of(plan, group)
    if (first.model, first.data) != (plan.model, plan.data.name):
        return f"{group.title}: the plan is for {plan.model} on {plan.data.name}"
    if gpu is None:
        return f"{group.title}, gpu={first.gpu}: the plan is for {', '.join(card['name'] for card in plan.gpus)}"
    if not (like := _rows_like(plan, gpu, group)):
        return f"{group.title}: no row of the plan has its techniques and settings"
    rows = planned_group(plan, gpu, group.variant, like)
    # Of a plan's versions only PyTorch's matters.
    planned_settings = {**plan.settings_of(like[0]), "gpu": gpu, "torch": plan.versions.get("torch")}
    settings = differing_settings(group_settings(group), flat(planned_settings))
    sides = (("measured", only_in(group, rows)), ("predicted", only_in(rows, group)))
    notes = [f"Only {side}: {', '.join(missing)}." for side, missing in sides if missing]
    alike = zip(*(side.results for side in common(group, rows)), strict=True)
    other = by_reason((why, a.combination) for a, b in alike if (why := _other_run(a, b, settings)))
    notes += [f"Left out, since {reason}: {', '.join(names)}." for reason, names in other.items()]
    measured, planned = common(group, rows, without=[name for names in other.values() for name in names])
    if not measured.results:
        return f"{group.title}: {' '.join(notes)}"
    return measured, planned, gpu, settings, notes


def _rows_like(plan: Plan, gpu: Settings, group: Group) -> list[PlanRow]:
    """A card's rows; in the plan of a sweep, those with a group's combinations and settings, whatever their recipe."""
    rows = plan.rows_on(gpu["name"])
    if not plan.is_sweep:
        return rows
    own, names = group_settings(group), _names(group)
    return [
        row
        for row in rows
        if row.combination in names
        and all(as_typed(own.get(key)) == as_typed(value) for key, value in row.settings.items() if key != RECIPE)
    ]


def joined(plan: Plan, matches: list[Match]) -> list[Match]:
    """In the plan of a sweep, merge the matches on one card that differ from the plan in the same settings."""
    alike: dict[Any, list[Match]] = {}
    for match in matches:
        alike.setdefault((match[2]["name"], *match[3]), []).append(match)
    return [_joined(plan, part) for part in alike.values()] if plan.is_sweep else matches


def _joined(plan: Plan, matches: list[Match]) -> Match:
    _, _, gpu, settings, _ = matches[0]
    notes = list(dict.fromkeys(note for *_, own in matches for note in own))
    places = {row.key: n for n, row in enumerate(plan.rows_on(gpu["name"]))}
    runs: list[tuple[Any, ...]] = [
        (places[row_key(planned.result.combination, own)], planned, own, measured)
        for a, b, *_ in matches
        for planned, own, measured in zip(b.rows, b.values, a.rows, strict=True)
    ]
    runs.sort(key=lambda run: run[0])
    found, planned, values, measured = (list(column) for column in zip(*runs, strict=True))
    alone = [label for n, label in enumerate(planned_group(plan, gpu).labels) if n not in found]
    columns = setting_columns(planned, values)
    notes += [f"Only predicted: {', '.join(alone)}."] if alone else []
    return Group("", measured, columns), Group("", planned, columns), gpu, settings, notes


def _other_run(measured: Result, planned: Result, settings: list[Difference]) -> str | None:
    sizes = measured.total_params, planned.total_params
    if None not in sizes and sizes[0] != sizes[1]:
        return f"the model has {sizes[0]:,} parameters in the sweep, {sizes[1]:,} in the plan"
    for key, a, b in settings:
        is_of_run = key in OF_EVERY_RUN or planned.optim.get(key.partition(".")[0])
        if is_of_run and "auto" not in (a, b):
            return f"{key} is {a} in the sweep, {b} in the plan"
    return None


def card_of(plan: Plan, group: Group) -> Settings | None:
    """The planned card that runs belong to: that of their profile, else of their device, else the only GPU or CPU."""
    finished = any(result.status == "ok" for result in group.results)
    kind = [gpu for gpu in plan.gpus if not finished or (gpu["device"] == "cuda") == group.on_cuda]
    named = [gpu for gpu in kind if gpu["name"] == group.results[0].gpu]
    alike = [gpu for gpu in kind if is_device(gpu, group)]
    return next((cards[0] for cards in (named, alike, kind) if len(cards) == 1), None)


def is_device(gpu: Settings, group: Group) -> bool:
    """Return True if a profile is of the device that a group really ran on, even under a smaller card's profile."""
    on_cuda = gpu["device"] == "cuda"
    return any(ran_on(result, gpu["name"], on_cuda) for result in group.results if result.status == "ok")


def differing_settings(a: Settings, b: Settings) -> list[Difference]:
    """Each setting that both have and that differs, in the order of their names."""
    both = sorted((a.keys() & b.keys()) - {RECIPE})  # what a recipe sets is compared, not its name
    keys = varied([{key: side[key] for key in both} for side in (a, b)])
    return [(key, as_typed(a[key]), as_typed(b[key])) for key in keys]


def group_settings(group: Group) -> Settings:
    """A group's settings, device and versions by full name: from the config of a run, else from its result."""
    first, versions = group.results[0], next((result.versions for result in group.results if result.versions), {})
    training = {"micro_batch_size": first.micro_batch_size, "packing": first.packing}
    limit = {"memory_limit_mib": group.memory_limit_mib}
    known = flat({**first.techniques, "training": training, "gpu": {"name": first.gpu}, "measure": limit})
    settings = next(filter(None, (run_settings(row.folder) for row in group.rows)), known)
    seeds = {SEED: seeds_text(group.seeds)} if group.seeds else {}
    return settings | seeds | {"device": group.device} | versions
