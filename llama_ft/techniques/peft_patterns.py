"""Numbers of a PEFT adapter that differ by layer: `rank_pattern` and `alpha_pattern`, regular expressions of names."""

import re
from collections.abc import Mapping

from llama_ft.config import UserError
from llama_ft.files import ADAPTER_CONFIG_FILE

MAX_TRIES = 2**20  # to match a pattern with a layer's name; more take seconds, or for ever


def by_pattern(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """A number that may differ by layer; the first pattern that fits the end of its name wins, as in PEFT."""
    for pattern, value in patterns.items():
        try:
            expression = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{ADAPTER_CONFIG_FILE}: {pattern} is no pattern of layers: {error}") from error
        n_repeats, n_groups = len(re.findall(r"(?<!\()[*+?{]", pattern)), max(1, pattern.count("("))
        if 32**n_repeats * (1 + pattern.count("|")) ** n_groups > MAX_TRIES or re.search(r"\)[*+{]", pattern):
            raise UserError(f"{ADAPTER_CONFIG_FILE}: {pattern} is too intricate: name the layers one by one")
        if expression.match(layer):
            return value
    return default
