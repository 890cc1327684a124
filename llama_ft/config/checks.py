"""What the schema is made of: keys with their meanings, checks of values, and the choices that some of them have."""

import enum
from dataclasses import field
from typing import Any

Settings = dict[str, Any]  # a section of the config in JSON's types; what keys it has the schema says


class UserError(Exception):
    """Something the user can put right. Its text says what is wrong, where, and what is allowed."""


class DtypeChoice(enum.Enum):
    """The 16-bit format of mixed precision; `auto` is bf16 where the device has it, else fp16."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"


class ComputeDtype(enum.Enum):
    """The dtype of weights and arithmetic where nothing is trained; `auto` is 16 bit on CUDA and fp32 on the CPU."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Format(enum.Enum):
    """Whose format a checkpoint has."""

    hf = "hf"
    meta = "meta"


class StoredDtype(enum.Enum):
    """The dtype that weights are stored in; `keep` is each weight's own."""

    keep = "keep"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class WeightStorage(enum.Enum):
    """How weights are stored under mixed precision: in the 16-bit compute dtype, or in fp32."""

    compute = "compute"
    fp32 = "fp32"


class OnBadRecord(enum.Enum):
    """What a record that cannot be used does: stop the run, or be left out and counted."""

    error = "error"
    skip = "skip"


class DeviceChoice(enum.Enum):
    """Where to run; `auto` is CUDA where there is a GPU, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Combinations(enum.Enum):
    """Which combinations are planned."""

    eight = "eight"
    sixteen = "sixteen"
    one = "one"


class Goal(enum.Enum):
    """What advice is asked for."""

    fit = "fit"
    cheapest_gpu = "cheapest_gpu"


def setting(default: Any, meaning: str) -> Any:
    """A field of the schema: its default, and in a few words what it is, for `--help`."""
    metadata = {"meaning": meaning}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise a UserError that names the key, its value and what is allowed, unless the condition holds."""
    # NaN compares false with everything, so `holds` written as a positive condition refuses it too.
    if not holds:
        raise UserError(f"{key}={value} is not allowed: it must be {allowed}")
