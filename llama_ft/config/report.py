"""What `python -m llama_ft.report` can be told."""

from dataclasses import dataclass, field

from llama_ft.config.checks import TrackerMode, check_project, setting


@dataclass
class UploadConfig:
    """Weights & Biases, for runs that are over."""

    mode: TrackerMode = setting(TrackerMode.auto, "auto is online where an API key is configured, else offline")
    project: str | None = setting(None, "the W&B project; null is the one that each run was told")
    upload: bool = setting(False, "send every run, and the sweep, to W&B again from the local files")

    def __post_init__(self) -> None:
        if self.project is not None:
            check_project(self.project)


@dataclass
class ReportConfig:
    """Everything `python -m llama_ft.report` can be told beside folders."""

    tracker: UploadConfig = field(default_factory=UploadConfig)
