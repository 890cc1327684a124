"""The schema of `conf/`: every key, its type, its default and what is allowed.

Plain dataclasses that know nothing of Hydra. `OmegaConf.to_object` runs `__post_init__`, where values are checked;
each check names the key, the value it got and what is allowed.
"""

import enum
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_ft.config.checks import (
    ComputeDtype,
    DeviceChoice,
    DtypeChoice,
    OnBadRecord,
    TrackerMode,
    UserError,
    WeightStorage,
    check,
)
from llama_ft.config.content import content_hash
from llama_ft.config.evaluate import EvaluateConfig
from llama_ft.config.generate import DecodingConfig, GenerateConfig
from llama_ft.config.groups import (
    PACKAGE_DIR,
    DataConfig,
    GpuConfig,
    GradientAccumulationConfig,
    GradientCheckpointingConfig,
    LoraConfig,
    MatrixRates,
    MeasureConfig,
    MixedPrecisionConfig,
    ModelConfig,
    OptimConfig,
    TrackerConfig,
    TrainingConfig,
)
from llama_ft.config.report import ReportConfig, UploadConfig
from llama_ft.config.source import ModelSource, TrainedSource

__all__ = [
    "PACKAGE_DIR",
    "ComputeDtype",
    "DataConfig",
    "DecodingConfig",
    "DeviceChoice",
    "DtypeChoice",
    "EvaluateConfig",
    "GenerateConfig",
    "GpuConfig",
    "GradientAccumulationConfig",
    "GradientCheckpointingConfig",
    "LoraConfig",
    "MatrixRates",
    "MeasureConfig",
    "MixedPrecisionConfig",
    "ModelConfig",
    "ModelSource",
    "OnBadRecord",
    "OptimConfig",
    "ReportConfig",
    "TrackerConfig",
    "TrackerMode",
    "TrainConfig",
    "TrainedSource",
    "TrainingConfig",
    "UploadConfig",
    "UserError",
    "WeightStorage",
    "config_dir",
]


def config_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it once installed."""
    inside = PACKAGE_DIR / "conf"
    return inside if inside.is_dir() else PACKAGE_DIR.parent / "conf"


@dataclass
class TrainConfig(ModelSource):
    """Everything `python -m llama_ft.train` can be told."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    ga: GradientAccumulationConfig = field(default_factory=GradientAccumulationConfig)
    mp: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    gc: GradientCheckpointingConfig = field(default_factory=GradientCheckpointingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.path is None and self.data.url is None and not self.data.is_builtin:
            raise UserError(f"data={self.data.name} needs data.path=FILE: a JSON or JSONL file of instruction records")
        most = self.model.context
        check(self.max_length <= most, "data.max_length", self.max_length, f"at most model.context={most}")

    @property
    def memory_limit_mb(self) -> int | None:
        """The limit to run under: the one given or that of the card's profile, whichever is smaller."""
        limits = [limit for limit in (self.measure.memory_limit_mb, self.gpu.usable_mb) if limit is not None]
        return min(limits, default=None)

    @property
    def max_length(self) -> int:
        """Longest sample in tokens."""
        return self.data.max_length or self.model.context

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, enums by name."""

        def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {key: value.name if isinstance(value, enum.Enum) else value for key, value in items}

        return asdict(self, dict_factory=plain)

    def hash(self, without: tuple[str, ...] = ()) -> str:
        """Identifies what is measured: equal for equal runs on equal files, wherever they lie. 16 hex digits.

        `without` leaves out sections of the config.
        """
        measured = {key: value for key, value in self.to_dict().items() if key not in ("tracker", *without)}
        for section, key in (("training", "save_every"), ("training", "resume"), ("data", "cache_dir")):
            del measured[section][key]  # how a run is kept and its data fetched, not what is run
        for holder, key in ((measured["data"], "path"), (measured, "tokenizer"), (measured, "checkpoint")):
            holder[key] = content_hash(holder[key]) if holder[key] else None
        return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]
