"""Numbers of a PEFT adapter that differ by layer: `rank_pattern` and `alpha_pattern`, regular expressions of names."""

import math
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
        if _most_tries(pattern) > MAX_TRIES:
            raise UserError(f"{ADAPTER_CONFIG_FILE}: {pattern} is too intricate: name the layers one by one")
        if expression.match(layer):
            return value
    return default


def _most_tries(pattern: str) -> float:
    """A bound on how often Python would try to match a pattern with a layer's name, up to a constant.

    Each of its repeats may end at each letter, and each of its groups may be any of the alternatives; where a group is
    repeated the tries double with each letter.
    """
    plain = re.sub(r"\\.|\[\^?.[^]]*\]", "x", pattern).replace("(?", "(")
    if re.search(r"\)[*+{]", plain):
        return math.inf
    return 32.0 ** len(re.findall(r"[*+?{]", plain)) * (1.0 + plain.count("|")) ** max(1, plain.count("("))
