"""Where a model comes from: the same keys for every command that loads one."""

from dataclasses import dataclass, field
from pathlib import Path

from llama_ft.config.checks import UserError, setting
from llama_ft.config.groups import ModelConfig


@dataclass
class ModelSource:
    """A model, its weights and its tokenizer."""

    model: ModelConfig = field(default_factory=ModelConfig)
    checkpoint: str | None = setting(None, "builtin, random or a folder; null is builtin where the model has one")
    tokenizer: str | None = setting(None, "a tokenizer.model, or Llama 3's tokenizer.json; null is the model's own")

    def __post_init__(self) -> None:
        name = self.model.name
        if self.checkpoint is None and self.model.is_builtin:
            self.checkpoint = "builtin"
        if self.checkpoint is None or (self.checkpoint == "builtin" and not self.model.is_builtin):
            raise UserError(f"model={name} has no built-in weights: give checkpoint=DIR, or checkpoint=random")
        if self.tokenizer is None and not self.model.is_builtin:
            raise UserError(f"model={name} has no built-in tokenizer: give tokenizer=FILE (its tokenizer.model)")

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer to load: the one given, else the model's own."""
        return Path(self.tokenizer).expanduser() if self.tokenizer else self.model.builtin_dir / "tokenizer.model"
