"""The settings of `python -m llama_ft.data`."""

from dataclasses import dataclass

from llama_ft.config.checks import setting
from llama_ft.config.source import RecordsSource


@dataclass
class DataCommandConfig(RecordsSource):
    """All settings of `data`."""

    output: str | None = setting(None, "folder to write the results to; null only prints them")

    def __post_init__(self) -> None:
        if self.checkpoint is None and not self.model.is_builtin:
            self.checkpoint = "random"  # weights are not read
        super().__post_init__()
        self.data.check_not_held_out("data")
