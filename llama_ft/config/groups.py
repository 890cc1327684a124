"""The config groups, one dataclass each, with every key's default and what is allowed."""

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llama_ft.config.checks import DeviceChoice, DtypeChoice, OnBadRecord, TrackerMode, WeightStorage, check

PACKAGE_DIR = Path(__file__).resolve().parent.parent


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
            check(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "at least 1")
        check(self.dim % self.n_heads == 0, "model.dim", self.dim, f"a multiple of model.n_heads={self.n_heads}")
        check(self.head_dim % 2 == 0, "model.dim", self.dim, "such that dim / n_heads is even (rotary pairs)")
        check(self.n_heads % self.n_kv_heads == 0, "model.n_kv_heads", self.n_kv_heads, f"a divisor of {self.n_heads}")
        check(0 < self.norm_eps < 1, "model.norm_eps", self.norm_eps, "between 0 and 1")
        check(0 < self.rope_theta < math.inf, "model.rope_theta", self.rope_theta, "positive and finite")

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
        check(self.steps >= 1, "ga.steps", self.steps, "at least 1")


@dataclass
class MixedPrecisionConfig:
    """Mixed precision, where `optim.mp` is on: compute, frozen and trainable dtypes, each said by itself."""

    dtype: DtypeChoice = DtypeChoice.auto
    frozen_weights: WeightStorage = WeightStorage.compute
    trainable_weights: WeightStorage = WeightStorage.fp32

    def __post_init__(self) -> None:
        fp16_masters = self.dtype is not DtypeChoice.fp16 or self.trainable_weights is WeightStorage.fp32
        check(fp16_masters, "mp.trainable_weights", "compute", "fp32 with mp.dtype=fp16 (gradients cannot be unscaled)")


@dataclass
class LoraConfig:
    """Low-rank adaptation, where `optim.lora` is on."""

    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["wq", "wv"])

    def __post_init__(self) -> None:
        check(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        check(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "positive and finite")
        check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0 and below 1")
        check(len(self.targets) > 0, "lora.targets", self.targets, "one name or more, such as [wq,wv]")


@dataclass
class GradientCheckpointingConfig:
    """Gradient checkpointing, where `optim.gc` is on."""

    every: int = 1  # keep the input of every n-th block

    def __post_init__(self) -> None:
        check(self.every >= 1, "gc.every", self.every, "at least 1")


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
    save_every: int | None = None  # optimizer steps between checkpoints; null saves none but at Ctrl-C
    resume: bool = False  # go on from the newest checkpoint in the run's folder

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            check(getattr(self, key) >= 1, f"training.{key}", getattr(self, key), "at least 1")
        if self.max_samples is not None:
            check(self.max_samples >= 1, "training.max_samples", self.max_samples, "at least 1, or null for all")
        if self.save_every is not None:
            check(self.save_every >= 1, "training.save_every", self.save_every, "at least 1, or null")
        check(0 < self.lr < math.inf, "training.lr", self.lr, "positive and finite")
        check(0 <= self.warmup_ratio <= 1, "training.warmup_ratio", self.warmup_ratio, "between 0 and 1")
        check(0 <= self.weight_decay < math.inf, "training.weight_decay", self.weight_decay, "0 or more, and finite")
        check(self.max_grad_norm > 0, "training.max_grad_norm", self.max_grad_norm, "positive (inf never clips)")
        check(0 <= self.seed < 2**63, "training.seed", self.seed, "at least 0 and below 2**63")

    @property
    def saves_when_interrupted(self) -> bool:
        """Whether Ctrl-C lets the optimizer step end and saves it, instead of stopping at once."""
        return self.save or self.save_every is not None


@dataclass
class DataConfig:
    """Instruction records: the built-in set, or a JSON or JSONL file of {instruction, input, output}."""

    name: str = "???"
    path: str | None = None
    url: str | None = None  # where the file is downloaded from if data.path names none
    git_blob_id: str | None = None  # of that file: SHA-1 of "blob SIZE\0" and its content; null accepts any
    cache_dir: str = "~/.cache/llama_ft"  # where it is kept
    first: int | None = None  # the data set is the first n records of the file
    max_length: int | None = None  # longer samples are truncated; null is the model's context
    on_bad_record: OnBadRecord = OnBadRecord.error

    def __post_init__(self) -> None:
        if self.first is not None:
            check(self.first >= 1, "data.first", self.first, "at least 1, or null for all")
        if self.max_length is not None:
            check(self.max_length >= 2, "data.max_length", self.max_length, "at least 2 tokens, or null")

    @property
    def is_builtin(self) -> bool:
        """Whether the records ship with the package."""
        return self.name == "sample"


@dataclass
class MatrixRates:
    """Peak rates of dense matrix products in TFLOP/s, as the maker states them; null where a card lacks the format."""

    fp32: float | None = None
    tf32: float | None = None
    fp16: float | None = None  # accumulated in fp32
    bf16: float | None = None

    def __post_init__(self) -> None:
        for key, rate in asdict(self).items():
            check(rate is None or 0 < rate < math.inf, f"gpu.tflops.{key}", rate, "positive and finite, or null")


@dataclass
class GpuConfig:
    """The device to run on. A card's profile also says what the card has; `auto` and `cpu` leave that open."""

    name: str = "???"
    device: DeviceChoice = DeviceChoice.auto
    memory_mb: int | None = None  # what PyTorch reports as the card's total memory
    context_mb: int = 0  # of it, what the CUDA context and its libraries take before the first tensor
    compute_capability: str | None = None  # such as 8.0
    bandwidth_gb_s: float | None = None  # peak memory bandwidth in 10**9 bytes per second
    tflops: MatrixRates = field(default_factory=MatrixRates)

    def __post_init__(self) -> None:
        memory, bandwidth = self.memory_mb, self.bandwidth_gb_s
        check(memory is None or memory >= 1, "gpu.memory_mb", memory, "at least 1, or null")
        below = math.inf if memory is None else memory
        check(0 <= self.context_mb < below, "gpu.context_mb", self.context_mb, "at least 0 and below gpu.memory_mb")
        version = self.compute_capability
        holds = version is None or re.fullmatch(r"\d+\.\d", version) is not None
        check(holds, "gpu.compute_capability", version, "two numbers such as '8.0', or null")
        check(bandwidth is None or 0 < bandwidth < math.inf, "gpu.bandwidth_gb_s", bandwidth, "positive and finite")

    @property
    def usable_mb(self) -> int | None:
        """What the allocator can have on this card; None where no profile says so."""
        return None if self.memory_mb is None else self.memory_mb - self.context_mb

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability as PyTorch gives it, such as (8, 0)."""
        if self.compute_capability is None:
            return None
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)


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
            check(self.memory_limit_mb >= 1, "measure.memory_limit_mb", self.memory_limit_mb, "at least 1, or null")
