"""What is allowed, and may surprise: keys without effect, and backslashes that are no line breaks."""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import reduce
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from llama_ft.cli.explain import setting_of
from llama_ft.config import TECHNIQUES, TrainConfig


def remarks(config: Any, overrides: Sequence[str], swept: Collection[str] = ()) -> Iterator[str]:
    """A line for each technique and each key whose value, given in the overrides, changes nothing, and for backslashes.

    Args:
        config: the checked config that the overrides led to.
        swept: keys and groups of which a sweep has several values: a technique that is on in some of its runs is used.
    """
    keys = [override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))]
    used = config.used_techniques if isinstance(config, TrainConfig) else set()
    for each in TECHNIQUES:
        idle = [key for key in keys if key.startswith(f"{each.name}.")]
        if idle and each.name not in used and not {"optim", f"optim.{each.name}"} & set(swept):
            yield f"{', '.join(idle)}: no effect without optim.{each.name}=true"
    for key in keys:
        entry, _ = setting_of(type(config), key)
        if entry is None:  # Hydra's own
            continue
        if (needs := entry.metadata.get("needs")) and not _value(config, needs.partition("=")[0]):
            yield f"{key}: no effect without {needs}"
        value = _value(config, key)
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and re.search(r"\\[nt]", text) for text in texts):
            yield f"{key}: a backslash stays a backslash; for a line break type, in bash, $'{key}=...\\n...'"


def _value(config: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
