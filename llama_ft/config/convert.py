"""The settings of `python -m llama_ft.convert`."""

from dataclasses import dataclass, field

from llama_ft.config.checks import Dtype, Format, UserError, check, check_settings, setting
from llama_ft.config.model import ModelConfig


@dataclass
class ConvertConfig:
    """All settings of `convert`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    checkpoint: str | None = setting(None, "a folder (Meta, Hugging Face or a run), or a GGUF file; builtin is tiny's")
    to: Format | None = setting(None, "the format to write: Hugging Face's, Meta's, or llama.cpp's (GGUF)")
    output: str | None = setting(None, "the folder or GGUF file to write; it must not exist yet")
    adapter: str | None = setting(None, "folder of a LoRA run or a PEFT adapter to merge into the weights")
    dtype: Dtype = setting(Dtype.keep, "of the written weights; keep is each weight's own", "keep fp32 bf16 fp16 q8_0")
    shards: int | None = setting(None, "files to write; null is one per 5 GB in Hugging Face's format, one in Meta's")
    tokenizer: str | None = setting(None, "a tokenizer to write next to the weights; null is the checkpoint's")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.checkpoint is None and self.model.is_builtin:
            self.checkpoint = "builtin"
        if self.checkpoint is None:
            raise UserError("give checkpoint=DIR: a folder in Meta's or Hugging Face's format, a run, or a GGUF file")
        if self.checkpoint == "random" or (self.checkpoint == "builtin" and not self.model.is_builtin):
            raise UserError(f"checkpoint={self.checkpoint} has no weights to convert: give checkpoint=DIR")
        if self.to is None:
            raise UserError("give to=hf, to=meta or to=gguf: the format to write")
        if self.output is None:
            raise UserError("give output=DIR: the folder to write, or with to=gguf the file")
        if (self.to is Format.gguf) != self.output.endswith(".gguf"):
            raise UserError(f"output={self.output} does not match to={self.to.name}: a GGUF file's name ends in .gguf")
        if self.to is not Format.gguf and self.dtype is Dtype.q8_0:
            raise UserError(f"dtype=q8_0 is for to=gguf, not for to={self.to.name}")
        if self.to is Format.gguf and self.shards is not None:
            raise UserError(f"shards={self.shards} is not for to=gguf, which writes one file: leave it out")
        if self.shards is not None:
            check(1 <= self.shards <= 1000, "shards", self.shards, "between 1 and 1000, or null")
