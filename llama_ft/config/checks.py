"""Building blocks of the schema: keys with their meanings, checks of values, and enums."""

import enum
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

E = TypeVar("E", bound=enum.Enum)
Settings = dict[str, Any]  # a section of the config in JSON's types, with the schema's keys


class UserError(Exception):
    """Something the user can put right. Its text says what is wrong, where, and what is allowed."""


class Diverged(UserError):
    """Training has led to a loss, or a gradient, that is no number."""


# A format of numbers, or how one is chosen. Each key says which of these it allows.
Dtype = enum.Enum("Dtype", ["auto", "keep", "compute", "fp32", "bf16", "fp16", "q8_0", "nf4", "fp4"])
# Whose format a checkpoint has.
Format = enum.Enum("Format", ["hf", "meta", "gguf"])
# What a record that cannot be used does: stop the run, or be skipped and counted.
OnBadRecord = enum.Enum("OnBadRecord", ["error", "skip"])
# What a sample that is longer than allowed does: be cut, be left out, or stop the run.
OnLong = enum.Enum("OnLong", ["truncate", "drop", "error"])
# What of a record is trained on: the assistant's turns, all that is read, or the last turn.
TrainOn = enum.Enum("TrainOn", ["assistant", "all", "last"])
# What of a checkpointed block is computed again in the backward pass.
Policy = enum.Enum("Policy", ["full", "selective"])
# Where the inputs of checkpointed blocks are kept, if not on the device.
Offload = enum.Enum("Offload", ["cpu"])
# Where to run; `auto` is CUDA where there is a GPU, else the CPU.
DeviceChoice = enum.Enum("DeviceChoice", ["auto", "cpu", "cuda"])
# Which combinations are planned: all of the techniques', or the one that is asked for.
Combinations = enum.Enum("Combinations", ["all", "one"])
# What advice is asked for.
Goal = enum.Enum("Goal", ["fit", "cheapest_gpu"])


def setting(default: Any, meaning: str, allowed: str = "", at_least: int | None = None, needs: str = "") -> Any:
    """A field of the schema: its default, what it is, for `--help`, its choices if not all, and its smallest number.

    `needs` is the setting, as one types it, without which it has no effect, or several with blanks between. One
    without a value, or with one in capitals such as FILE, is any but the default; `|` stands between several values.
    """
    metadata = {"meaning": meaning, "allowed": allowed.split(), "at_least": at_least, "needs": needs}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise a UserError that names the key, its value and what is allowed, unless the condition holds."""
    # NaN compares false with everything, so `holds` written as a positive condition refuses it too.
    if not holds:
        raise UserError(f"{key}={value} is not allowed: it must be {allowed}")


def choice(kind: type[E], key: str, name: str) -> E:
    """The member of an enum that has this name; a UserError that names the key and what is allowed if none has."""
    check(name in kind.__members__, key, name, f"one of {', '.join(kind.__members__)}")
    return kind[name]


def check_settings(section: Any, prefix: str = "") -> None:
    """Raise a UserError for a key of the section that has another value than its `setting` allows."""
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
    """Make whatever a damaged file leads to in this block a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{file} cannot be read: {reason}") from error


def literal(value: Any) -> Any:
    """A value, or a section with all its values, that OmegaConf gives back as it is: `${` begins no interpolation."""
    if isinstance(value, dict):
        return {key: literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [literal(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
