"""Keys shared by the commands that load a model: its source, its records and its device."""

import enum
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_ft.config.checks import Dtype, Settings, UserError, check_settings, setting
from llama_ft.config.groups import DataConfig, GpuConfig
from llama_ft.config.model import ModelConfig

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # in this order: LLaMA-2's second is converted from the first
GGUF_MAGIC = b"GGUF"


def path_of(name: str | Path) -> Path:
    """The path of a file or folder as the user names it: `~` is the home folder."""
    return Path(os.path.expanduser(name))


def is_gguf(path: Path) -> bool:
    """Return True if a checkpoint is a GGUF file, by its name or its first bytes, not a folder."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.is_file()
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:  # the code that reads the file raises a better message
        return False


def found_tokenizer(model: ModelConfig, checkpoint: str | None) -> str | None:
    """Find the tokenizer in a checkpoint (GGUF file or folder); None if it has none, or if the model has its own."""
    if model.is_builtin or checkpoint in (None, "builtin", "random"):
        return None
    place = path_of(str(checkpoint))
    files = [place] if is_gguf(place) else [place / name for name in TOKENIZER_FILES]
    return next((str(file) for file in files if file.is_file()), None)


@dataclass
class ModelSource:
    """A model, its weights and its tokenizer."""

    model: ModelConfig = field(default_factory=ModelConfig)
    checkpoint: str | None = setting(None, "builtin, random, a folder, a GGUF file or hub:ORG/NAME; null is builtin")
    tokenizer: str | None = setting(
        None, "a tokenizer.model, or a BPE's tokenizer.json; null is the model's own, or the one in the checkpoint"
    )

    def __post_init__(self) -> None:
        name = self.model.name
        if self.checkpoint is None and self.model.is_builtin:
            self.checkpoint = "builtin"
        if self.checkpoint is None or (self.checkpoint == "builtin" and not self.model.is_builtin):
            raise UserError(f"model={name} has no built-in weights: give checkpoint=DIR, or checkpoint=random")
        self.tokenizer = self.tokenizer or found_tokenizer(self.model, self.checkpoint)
        if self.tokenizer is None and not self.model.is_builtin:
            where = f"model={name} has no built-in tokenizer, and checkpoint={self.checkpoint} holds none"
            raise UserError(f"{where}: give tokenizer=FILE (its tokenizer.model or tokenizer.json)")

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer to load: the one given, else the model's own."""
        return path_of(self.tokenizer or self.model.builtin_dir / "tokenizer.model")

    def to_dict(self) -> Settings:
        """Convert to plain JSON types, enums by name."""

        def plain(items: list[tuple[str, Any]]) -> Settings:
            return {key: value.name if isinstance(value, enum.Enum) else value for key, value in items}

        return asdict(self, dict_factory=plain)


@dataclass
class RecordsSource(ModelSource):
    """A model, and the records that it reads."""

    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.check_for(self.model)

    @property
    def max_length(self) -> int:
        """Longest sample in tokens."""
        return self.data.max_length or self.model.max_seq_len


@dataclass
class TrainedSource(ModelSource):
    """A model for inference, with or without an adapter, and the weights to compare it with."""

    gpu: GpuConfig = field(default_factory=GpuConfig)
    adapter: str | None = setting(None, "folder of a run that trained a LoRA adapter on these weights")
    merge: bool = setting(True, "merge the adapter into the weights; with false, and in a dialogue, it stays separate")
    base: str | None = setting(None, "weights to compare with: builtin, random or a folder; null: without the adapter")
    kv_cache: bool = setting(True, "keep the keys and values of earlier tokens; false recomputes them each time")
    dtype: Dtype = setting(
        Dtype.auto,
        "of weights and arithmetic; auto is 16-bit on CUDA, fp32 on the CPU; nf4 and fp4 store weights in 4 bits",
        "auto fp32 bf16 fp16 nf4 fp4",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        self.gpu.check_is_one()
        if not self.merge and self.adapter is None:
            raise UserError("merge=false keeps an adapter separate, and there is none: give adapter=DIR")
        if self.base == "builtin" and not self.model.is_builtin:
            raise UserError(f"base=builtin: model={self.model.name} has no built-in weights")
