"""The schema of `conf/`: every key, its type, its default and what is allowed.

Plain dataclasses that know nothing of Hydra. `OmegaConf.to_object` runs `__post_init__`, where values are checked;
each check names the key, the value it got and what is allowed.
"""

import enum
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PACKAGE_DIR = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can put right. Its text says what is wrong, where, and what is allowed."""


class DtypeChoice(enum.Enum):
    """The 16-bit format of mixed precision; `auto` is bf16 where the device has it, else fp16."""

    auto = "auto"
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


class TrackerMode(enum.Enum):
    """W&B's mode; `auto` is online where an API key is configured, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


def _check(holds: bool, key: str, value: object, allowed: str) -> None:
    # NaN compares false with everything, so `holds` written as a positive condition refuses it too.
    if not holds:
        raise UserError(f"{key}={value} is not allowed: it must be {allowed}")


@dataclass
class ModelConfig:
    """Sizes of a LLaMA decoder, in the terms of Meta's `params.json`."""

    name: str = "???"
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32
    ffn_dim: int = 11008
    vocab_size: int = 32000
    context: int = 4096  # longest sequence in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "context"):
            _check(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "at least 1")
        _check(self.dim % self.n_heads == 0, "model.dim", self.dim, f"a multiple of model.n_heads={self.n_heads}")
        _check(self.head_dim % 2 == 0, "model.dim", self.dim, "such that dim / n_heads is even (rotary pairs)")
        _check(self.n_heads % self.n_kv_heads == 0, "model.n_kv_heads", self.n_kv_heads, f"a divisor of {self.n_heads}")
        _check(0 < self.norm_eps < 1, "model.norm_eps", self.norm_eps, "between 0 and 1")
        _check(0 < self.rope_theta < math.inf, "model.rope_theta", self.rope_theta, "positive and finite")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def builtin_dir(self) -> Path:
        """Folder of the files that ship with this model; exists only for built-in models."""
        return PACKAGE_DIR / "model" / self.name

    @property
    def is_builtin(self) -> bool:
        """Whether a tokenizer for this model ships with the package."""
        return (self.builtin_dir / "tokenizer.model").is_file()


@dataclass
class OptimConfig:
    """Which of the four techniques are on."""

    ga: bool = False
    mp: bool = False
    lora: bool = False
    gc: bool = False

    @property
    def combination(self) -> str:
        """The techniques that are on, joined by `_`; `baseline` if none is."""
        return "_".join(name for name, on in asdict(self).items() if on) or "baseline"


@dataclass
class GradientAccumulationConfig:
    """Gradient accumulation, where `optim.ga` is on."""

    steps: int = 8  # micro-batches in an optimizer step

    def __post_init__(self) -> None:
        _check(self.steps >= 1, "ga.steps", self.steps, "at least 1")


@dataclass
class MixedPrecisionConfig:
    """Mixed precision, where `optim.mp` is on: compute, frozen and trainable dtypes, each said by itself."""

    dtype: DtypeChoice = DtypeChoice.auto
    frozen_weights: WeightStorage = WeightStorage.compute
    trainable_weights: WeightStorage = WeightStorage.fp32

    def __post_init__(self) -> None:
        fp16_masters = self.dtype is not DtypeChoice.fp16 or self.trainable_weights is WeightStorage.fp32
        _check(
            fp16_masters, "mp.trainable_weights", "compute", "fp32 with mp.dtype=fp16 (gradients cannot be unscaled)"
        )


@dataclass
class LoraConfig:
    """Low-rank adaptation, where `optim.lora` is on."""

    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["wq", "wv"])

    def __post_init__(self) -> None:
        _check(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        _check(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "positive and finite")
        _check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0 and below 1")
        _check(len(self.targets) > 0, "lora.targets", self.targets, "one name or more, such as [wq,wv]")


@dataclass
class GradientCheckpointingConfig:
    """Gradient checkpointing, where `optim.gc` is on."""

    every: int = 1  # keep the input of every n-th block

    def __post_init__(self) -> None:
        _check(self.every >= 1, "gc.every", self.every, "at least 1")


@dataclass
class TrainingConfig:
    """The loop and its optimizer."""

    lr: float = 1e-5
    epochs: int = 1
    batch_size: int = 1  # samples in a micro-batch
    max_samples: int | None = None  # train on the first n samples only
    warmup_ratio: float = 0.03  # share of the optimizer steps in which the learning rate rises
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    save: bool = True  # write the adapter, or without LoRA all weights, into the run's folder

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            _check(getattr(self, key) >= 1, f"training.{key}", getattr(self, key), "at least 1")
        if self.max_samples is not None:
            _check(self.max_samples >= 1, "training.max_samples", self.max_samples, "at least 1, or null for all")
        _check(0 < self.lr < math.inf, "training.lr", self.lr, "positive and finite")
        _check(0 <= self.warmup_ratio <= 1, "training.warmup_ratio", self.warmup_ratio, "between 0 and 1")
        _check(0 <= self.weight_decay < math.inf, "training.weight_decay", self.weight_decay, "0 or more, and finite")
        _check(self.max_grad_norm > 0, "training.max_grad_norm", self.max_grad_norm, "positive (inf never clips)")
        _check(0 <= self.seed < 2**63, "training.seed", self.seed, "at least 0 and below 2**63")


@dataclass
class DataConfig:
    """Instruction records: the built-in set, or a JSON or JSONL file of {instruction, input, output}."""

    name: str = "???"
    path: str | None = None
    first: int | None = None  # the data set is the first n records of the file
    max_length: int | None = None  # longer samples are truncated; null is the model's context
    on_bad_record: OnBadRecord = OnBadRecord.error

    def __post_init__(self) -> None:
        if self.first is not None:
            _check(self.first >= 1, "data.first", self.first, "at least 1, or null for all")
        if self.max_length is not None:
            _check(self.max_length >= 2, "data.max_length", self.max_length, "at least 2 tokens, or null")

    @property
    def is_builtin(self) -> bool:
        """Whether the records ship with the package."""
        return self.name == "sample"


@dataclass
class GpuConfig:
    """The card to run on."""

    name: str = "???"
    device: DeviceChoice = DeviceChoice.auto


@dataclass
class TrackerConfig:
    """Weights & Biases. Local files are written in any case."""

    mode: TrackerMode = TrackerMode.auto
    project: str = "llama_ft"


@dataclass
class MeasureConfig:
    """What is measured, and under which limit."""

    memory_limit_mb: int | None = None  # CPU: the process's data segment; CUDA: the allocator

    def __post_init__(self) -> None:
        if self.memory_limit_mb is not None:
            _check(self.memory_limit_mb >= 1, "measure.memory_limit_mb", self.memory_limit_mb, "at least 1, or null")


@dataclass
class TrainConfig:
    """Everything `python -m llama_ft.train` can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
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
    checkpoint: str | None = None  # builtin, random or a folder; null is builtin where the model has one
    tokenizer: str | None = None  # a SentencePiece tokenizer.model; null is the model's own where it has one

    def __post_init__(self) -> None:
        name = self.model.name
        if self.checkpoint is None and self.model.is_builtin:
            self.checkpoint = "builtin"
        if self.checkpoint is None or (self.checkpoint == "builtin" and not self.model.is_builtin):
            raise UserError(f"model={name} has no built-in weights: give checkpoint=DIR, or checkpoint=random")
        if self.tokenizer is None and not self.model.is_builtin:
            raise UserError(f"model={name} has no built-in tokenizer: give tokenizer=FILE (its tokenizer.model)")
        if self.data.path is None and not self.data.is_builtin:
            raise UserError(f"data={self.data.name} needs data.path=FILE: a JSON or JSONL file of instruction records")
        most = self.model.context
        _check(self.max_length <= most, "data.max_length", self.max_length, f"at most model.context={most}")

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer to load: the one given, else the model's own."""
        return Path(self.tokenizer).expanduser() if self.tokenizer else self.model.builtin_dir / "tokenizer.model"

    @property
    def max_length(self) -> int:
        """Longest sample in tokens."""
        return self.data.max_length or self.model.context

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, enums by name."""

        def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {key: value.name if isinstance(value, enum.Enum) else value for key, value in items}

        return asdict(self, dict_factory=plain)

    def hash(self) -> str:
        """Identifies what is measured: equal for equal runs, whatever they are tracked by. 16 hex digits."""
        measured = {key: value for key, value in self.to_dict().items() if key != "tracker"}
        return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]
