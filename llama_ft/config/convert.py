"""What `python -m llama_ft.convert` can be told."""

from dataclasses import dataclass, field

from llama_ft.config.checks import Dtype, Format, UserError, check, check_settings, setting
from llama_ft.config.model import ModelConfig


@dataclass
class ConvertConfig:
    """Everything `python -m llama_ft.convert` can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    checkpoint: str | None = setting(None, "a folder of Meta, Hugging Face or a run, or a GGUF file; builtin is tiny's")
    to: Format | None = setting(None, "the format to write: Hugging Face's, Meta's, or llama.cpp's, GGUF")
    output: str | None = setting(None, "the folder, or the GGUF file, to write, which must not be there yet")
    adapter: str | None = setting(None, "folder of a run with LoRA or of a PEFT adapter, merged into the weights")
    dtype: Dtype = setting(Dtype.keep, "of the weights written; keep is each weight's own", "keep fp32 bf16 fp16 q8_0")
    shards: int | None = setting(None, "files to write; null is one per 5 GB in Hugging Face's format, one in Meta's")
    tokenizer: str | None = setting(None, "a tokenizer to put beside the weights; null is the one in the checkpoint")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.checkpoint is None and self.model.is_builtin:
            self.checkpoint = "builtin"
        if self.checkpoint is None:
            raise UserError("give checkpoint=DIR: a folder of Meta's or Hugging Face's, or of a run, or a GGUF file")
        if self.checkpoint == "random" or (self.checkpoint == "builtin" and not self.model.is_builtin):
            raise UserError(f"checkpoint={self.checkpoint}: there are no weights to convert; give checkpoint=DIR")
        if self.to is None:
            raise UserError("give to=hf, to=meta or to=gguf: the format to write")
        if self.output is None:
            raise UserError("give output=DIR: the folder to write, or the file with to=gguf")
        if (self.to is Format.gguf) != self.output.endswith(".gguf"):
            raise UserError(f"output={self.output} goes not with to={self.to.name}: a GGUF file's name ends in .gguf")
        if self.to is not Format.gguf and self.dtype is Dtype.q8_0:
            raise UserError(f"dtype=q8_0 is for to=gguf, and not for to={self.to.name}")
        if self.to is Format.gguf and self.shards is not None:
            raise UserError(f"shards={self.shards} is not for to=gguf, which writes one file: leave it out")
        if self.shards is not None:
            check(1 <= self.shards <= 1000, "shards", self.shards, "between 1 and 1000, or null")
