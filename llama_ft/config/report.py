"""What `python -m llama_ft.report` can be told."""

from dataclasses import dataclass, field

from llama_ft.config.checks import setting
from llama_ft.config.tracker import TrackerConfig


@dataclass
class UploadConfig(TrackerConfig):
    """The tracker for runs that are over. What is not given is as each run was told."""

    upload: bool = setting(False, "send every run, and the sweep, to the tracker again from the local files")


@dataclass
class ReportConfig:
    """Everything `python -m llama_ft.report` can be told beside folders."""

    tracker: UploadConfig = field(default_factory=UploadConfig)
