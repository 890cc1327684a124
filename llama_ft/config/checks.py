"""Building blocks of the schema: keys with their meanings, checks of values, and enums."""

import enum
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import Any

Settings = dict[str, Any]  # a section of the config in JSON's types, with the schema's keys


class UserError(Exception):
    """An error that the user can fix. Its text says what is wrong, where, and what is allowed."""


class Diverged(UserError):
    """A loss or gradient became NaN or infinite."""


# A number format, or a rule that chooses one. Each key lists those it allows.
Dtype = enum.Enum("Dtype", ["auto", "keep", "compute", "fp32", "bf16", "fp16", "q8_0", "nf4", "fp4"])
# Format of a checkpoint.
Format = enum.Enum("Format", ["hf", "meta", "gguf"])
# For a record that cannot be used: stop the run, or skip and count it.
OnBadRecord = enum.Enum("OnBadRecord", ["error", "skip"])
# For a sample longer than allowed: cut it, leave it out, or stop the run.
OnLong = enum.Enum("OnLong", ["truncate", "drop", "error"])
# Part of a record to train on: the assistant's turns, everything, or the assistant's last turn.
TrainOn = enum.Enum("TrainOn", ["assistant", "all", "last"])
# Part of a checkpointed block that is recomputed in the backward pass.
Policy = enum.Enum("Policy", ["full", "selective"])
# Storage of the inputs of checkpointed blocks, if not on the device.
Offload = enum.Enum("Offload", ["cpu"])
# Device to run on; `auto` is CUDA if there is a GPU, else the CPU.
DeviceChoice = enum.Enum("DeviceChoice", ["auto", "cpu", "cuda"])
# Combinations to plan: all of the techniques, or only the given one.
Combinations = enum.Enum("Combinations", ["all", "one"])
# Goal of the advice: the fastest combination that fits, or the smallest card.
Goal = enum.Enum("Goal", ["fit", "cheapest_gpu"])


def setting(default: Any, meaning: str, allowed: str = "", at_least: int | None = None, needs: str = "") -> Any:
    """Return a schema field: its default, its meaning for `--help`, its choices if not all, and its minimum.

    `needs` lists the settings, separated by blanks, without which the field has no effect, as typed. A setting without
    a value, or with one in capitals such as FILE, means any value but the default; `|` separates several values.
    """
    metadata = {"meaning": meaning, "allowed": allowed.split(), "at_least": at_least, "needs": needs}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise a UserError that names the key, its value and what is allowed, unless the condition holds."""
    # NaN compares false with everything, so a positive condition rejects it too.
    if not holds:
        raise UserError(f"{key}={value} is not allowed: it must be {allowed}")


def check_settings(section: Any, prefix: str = "") -> None:
    """Raise a UserError for a key of the section whose value its `setting` does not allow."""
    for entry in fields(section):
        key, value = f"{prefix}{entry.name}", getattr(section, entry.name)
        if names := entry.metadata.get("allowed"):
            check(value.name in names, key, value.name, f"one of {', '.join(names)}")
        least = entry.metadata.get("at_least")
        if least is not None and value is not None:
            check(value >= least, key, value, f"at least {least}{', or null' if entry.default is None else ''}")


def flat(settings: Any, prefix: str = "") -> Settings:
    """Nested settings by full name: `{"lora": {"rank": 16}}` as `{"lora.rank": 16}`."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    return {k: v for key, value in settings.items() for k, v in flat(value, f"{prefix}{key}.").items()}


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn any exception in this block into a UserError that names the damaged file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{file} cannot be read: {reason}") from error


def literal(value: Any) -> Any:
    """Escape `${` in a value, or in all values of a section, so that OmegaConf does not interpolate it."""
    if isinstance(value, dict):
        return {key: literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [literal(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
