"""Building blocks of the schema: keys with their meanings, checks of values, and enums."""

import enum
from dataclasses import field, fields
from typing import Any

Settings = dict[str, Any]  # a section of the config in JSON's types, with the schema's keys


class UserError(Exception):
    """Something the user can put right. Its text says what is wrong, where, and what is allowed."""


class Dtype(enum.Enum):
    """A floating-point format, or how one is chosen. Each key says which of these it allows."""

    auto = "auto"
    keep = "keep"
    compute = "compute"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Format(enum.Enum):
    """Whose format a checkpoint has."""

    hf = "hf"
    meta = "meta"


class OnBadRecord(enum.Enum):
    """What a record that cannot be used does: stop the run, or be skipped and counted."""

    error = "error"
    skip = "skip"


class DeviceChoice(enum.Enum):
    """Where to run; `auto` is CUDA where there is a GPU, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Combinations(enum.Enum):
    """Which combinations are planned: all of the techniques', or the one that is asked for."""

    all = "all"
    one = "one"


class Goal(enum.Enum):
    """What advice is asked for."""

    fit = "fit"
    cheapest_gpu = "cheapest_gpu"


def setting(default: Any, meaning: str, allowed: tuple[enum.Enum, ...] = ()) -> Any:
    """A field of the schema: its default, what it is in a few words, for `--help`, and its choices if not all."""
    metadata = {"meaning": meaning, "allowed": allowed}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise a UserError that names the key, its value and what is allowed, unless the condition holds."""
    # NaN compares false with everything, so `holds` written as a positive condition refuses it too.
    if not holds:
        raise UserError(f"{key}={value} is not allowed: it must be {allowed}")


def check_choices(section: Any, prefix: str = "") -> None:
    """Raise a UserError for a key of the section that has a choice other than its `setting` allows."""
    for entry in fields(section):
        allowed, value = entry.metadata.get("allowed"), getattr(section, entry.name)
        if allowed:
            names = ", ".join(choice.name for choice in allowed)
            check(value in allowed, f"{prefix}{entry.name}", value.name, f"one of {names}")
