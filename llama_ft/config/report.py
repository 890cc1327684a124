"""What `python -m llama_ft.report` can be told."""

from dataclasses import dataclass, field

from llama_ft.config.checks import setting
from llama_ft.config.groups import TrackerConfig


@dataclass
class UploadConfig(TrackerConfig):
    """Weights & Biases, for runs that are over."""

    upload: bool = setting(False, "send every run, and the sweep, to W&B again from the local files")


@dataclass
class ReportConfig:
    """Everything `python -m llama_ft.report` can be told beside folders."""

    tracker: UploadConfig = field(default_factory=UploadConfig)
