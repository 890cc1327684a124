"""Per-layer numbers of a PEFT adapter: `rank_pattern` and `alpha_pattern`, keyed by regular expressions."""

import re
from collections.abc import Mapping

from llama_ft.config import UserError
from llama_ft.files import ADAPTER_CONFIG_FILE

MAX_TRIES = 2**20  # to match a pattern with a layer's name; more take seconds, or forever


def by_pattern(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """A layer's number: the first pattern that matches the end of its name wins, as in PEFT."""
    for pattern, value in patterns.items():
        try:
            expression = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{ADAPTER_CONFIG_FILE}: {pattern} is not a pattern of layers: {error}") from error
        n_repeats, n_groups = len(re.findall(r"(?<!\()[*+?{]", pattern)), max(1, pattern.count("("))
        if 32**n_repeats * (1 + pattern.count("|")) ** n_groups > MAX_TRIES or re.search(r"\)[*+{]", pattern):
            raise UserError(f"{ADAPTER_CONFIG_FILE}: {pattern} is too complex: name the layers one by one")
        if expression.match(layer):
            return value
    return default
