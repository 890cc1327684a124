"""Command lines that sweep, taken apart into their runs."""

import itertools
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from llama_ft.config import config_dir


def _swept_values(override: Override) -> list[str]:
    """What the sweep puts in the override's place, one at a time."""
    value = override.value()
    if isinstance(value, Glob):
        return value.filter(sorted(file.stem for file in (config_dir() / override.key_or_group).glob("*.yaml")))
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return list(override.sweep_string_iterator())


def single_runs(overrides: list[str]) -> Iterator[list[str]]:
    """The overrides of each run."""
    choices = [
        [f"{override.get_key_element()}={value}" for value in _swept_values(override)]
        if override.is_sweep_override()
        else [override.input_line]
        for override in OverridesParser.create().parse_overrides(overrides)
    ]
    yield from (list(choice) for choice in itertools.product(*choices))
