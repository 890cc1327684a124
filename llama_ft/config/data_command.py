"""What `python -m llama_ft.data` can be told."""

from dataclasses import dataclass

from llama_ft.config.checks import setting
from llama_ft.config.source import RecordsSource


@dataclass
class DataCommandConfig(RecordsSource):
    """Everything `python -m llama_ft.data` can be told."""

    output: str | None = setting(None, "folder of the results too; null prints them alone")

    def __post_init__(self) -> None:
        if self.checkpoint is None and not self.model.is_builtin:
            self.checkpoint = "random"  # no weight is read
        super().__post_init__()
        self.data.check_not_held_out("data")
