"""What `python -m llama_ft.data` can be told."""

from dataclasses import dataclass, field

from llama_ft.config.checks import setting
from llama_ft.config.groups import DataConfig
from llama_ft.config.source import ModelSource


@dataclass
class DataCommandConfig(ModelSource):
    """Everything `python -m llama_ft.data` can be told."""

    data: DataConfig = field(default_factory=DataConfig)
    output: str | None = setting(None, "folder of the results too; null prints them alone")

    def __post_init__(self) -> None:
        if self.checkpoint is None and not self.model.is_builtin:
            self.checkpoint = "random"  # no weight is read
        super().__post_init__()
        self.data.check_for(self.model)

    @property
    def max_length(self) -> int:
        """Longest sample in tokens."""
        return self.data.max_length or self.model.max_seq_len
