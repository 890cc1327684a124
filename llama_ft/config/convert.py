"""What `python -m llama_ft.convert` can be told."""

from dataclasses import dataclass, field

from llama_ft.config.checks import Dtype, Format, UserError, check, check_settings, setting
from llama_ft.config.model import ModelConfig


@dataclass
class ConvertConfig:
    """Everything `python -m llama_ft.convert` can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    checkpoint: str | None = setting(None, "the folder to read, of Meta, Hugging Face or a run; builtin is tiny's")
    to: Format | None = setting(None, "the format to write: Hugging Face's, for transformers, or Meta's")
    output: str | None = setting(None, "the folder to write, which must not be there yet, or be empty")
    adapter: str | None = setting(None, "folder of a run with LoRA or of a PEFT adapter, merged into the weights")
    dtype: Dtype = setting(Dtype.keep, "of the weights written; keep is each weight's own", "keep fp32 bf16 fp16")
    shards: int | None = setting(None, "files to write; null is one per 5 GB in Hugging Face's format, one in Meta's")
    tokenizer: str | None = setting(None, "a tokenizer to put beside the weights; null is the one in the checkpoint")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.checkpoint is None and self.model.is_builtin:
            self.checkpoint = "builtin"
        if self.checkpoint is None:
            raise UserError("give checkpoint=DIR: the folder of Meta's or Hugging Face's files, or of a run")
        if self.checkpoint == "random" or (self.checkpoint == "builtin" and not self.model.is_builtin):
            raise UserError(f"checkpoint={self.checkpoint}: there are no weights to convert; give checkpoint=DIR")
        if self.to is None:
            raise UserError("give to=hf or to=meta: the format to write")
        if self.output is None:
            raise UserError("give output=DIR: the folder to write")
        if self.shards is not None:
            check(1 <= self.shards <= 1000, "shards", self.shards, "between 1 and 1000, or null")
