"""Remarks on arguments that change nothing, or mean something else than it seems."""

import enum
import json
import re
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

from llama_ft.cli.explain import setting_of
from llama_ft.cli.texts import parsed
from llama_ft.config import TECHNIQUES, TrainConfig

SECTIONS = {each.name for each in TECHNIQUES}
Alternatives = Callable[[set[str]], Iterable[Any]]


def remarks(config: Any, overrides: list[str], alternatives: Alternatives = lambda _: ()) -> Iterator[str]:
    """Yield a line for the given keys that have no effect without the same settings, and for each backslash.

    Args:
        config: the checked config that the overrides made.
        alternatives: for a sweep, gives the configs of its runs as far as the keys it is passed differ in them.
    """
    schema, keys = type(config), list(dict.fromkeys(override.key_or_group for override in parsed(overrides)))
    unmet = {key: needs for key in keys if not holds(config, schema, needs := needs_of(schema, key))}
    others = list(alternatives({each.partition("=")[0] for needs in unmet.values() for each in needs}))
    idle: dict[tuple[str, ...], list[str]] = {}
    for key, needs in unmet.items():
        if not any(holds(other, schema, needs) for other in others):
            idle.setdefault(needs, []).append(key)
    for needs, together in idle.items():
        yield f"{', '.join(together)}: no effect without {' and '.join(needs)}"
    for key in keys:
        value = attrgetter(key)(config) if setting_of(schema, key)[0] else None  # else it is Hydra's own
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and re.search(r"\\[nt]", text) for text in texts):
            yield f"{key}: a backslash stays a backslash; for a line break type, in bash, $'{key}=...\\n...'"


def needs_of(schema: type, key: str) -> tuple[str, ...]:
    """The settings without which a key has no effect: those that its `setting` names, and a technique's switch."""
    entry, section = setting_of(schema, key)[0], key.partition(".")[0]
    switch = [f"optim.{section}=true"] if section in SECTIONS else []
    return (*switch, *entry.metadata.get("needs", "").split()) if entry else ()


def holds(config: Any, schema: type, needs: Iterable[str]) -> bool:
    """Return True if a config, checked or only composed, has all these settings."""
    return all(_has(config, schema, *each.partition("=")[::2]) for each in needs)


def _has(config: Any, schema: type, key: str, wanted: str) -> bool:
    if isinstance(config, TrainConfig) and key.startswith("optim."):
        return key.removeprefix("optim.") in config.used_techniques  # for a plan, in any of its combinations
    value, (entry, _) = attrgetter(key)(config), setting_of(schema, key)
    if not wanted or wanted.isupper():
        return bool(entry and value != entry.default)
    text = value.name if isinstance(value, enum.Enum) else value if isinstance(value, str) else json.dumps(value)
    return text in wanted.split("|")
