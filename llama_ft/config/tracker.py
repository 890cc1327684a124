"""Where a run is tracked."""

from dataclasses import dataclass

from llama_ft.config.checks import TrackerMode, check_project, setting


@dataclass
class TrackerConfig:
    """Weights & Biases. Local files are written in any case."""

    mode: TrackerMode = setting(TrackerMode.auto, "auto is online where an API key is configured, else offline")
    project: str = setting("llama_ft", "the W&B project")

    def __post_init__(self) -> None:
        check_project(self.project)
