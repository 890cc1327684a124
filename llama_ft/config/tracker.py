"""Where a run is tracked, and what `python -m llama_ft.report` can be told: tracking runs that are over."""

import enum
import re
from dataclasses import dataclass, field

from llama_ft.config.checks import check, setting

# What tracks runs; chosen as a group.
TrackerKind = enum.Enum("TrackerKind", ["wandb", "tensorboard", "disabled"])
# W&B's mode; `auto` is online where an API key is configured, else offline.
TrackerMode = enum.Enum("TrackerMode", ["auto", "online", "offline"])


@dataclass
class TrackerConfig:
    """Weights & Biases, TensorBoard or nothing. Local files are written in any case."""

    kind: TrackerKind = setting(TrackerKind.wandb, "what tracks; the choice of the group sets it")
    mode: TrackerMode = setting(TrackerMode.auto, "W&B's; auto: WANDB_MODE, else online with an API key, else offline")
    project: str | None = setting(None, "the W&B project; null is WANDB_PROJECT, else llama_ft")
    entity: str | None = setting(None, "the W&B user or team; null is WANDB_ENTITY, else the API key's own")
    group: str | None = setting(None, "the W&B group; null is WANDB_RUN_GROUP, else the sweep's folder")
    tags: list[str] = setting([], "W&B tags beside those of techniques, model and card; [] is those of WANDB_TAGS")
    notes: str | None = setting(None, "text for the W&B run; null is WANDB_NOTES")

    def __post_init__(self) -> None:
        holds = self.project is None or re.fullmatch(r"[^/\\#?%:]{1,128}", self.project) is not None
        check(holds, "tracker.project", self.project, "1 to 128 characters without / \\ # ? % :")


@dataclass
class UploadConfig(TrackerConfig):
    """The tracker for runs that are over. What is not given is as each run was told."""

    upload: bool = setting(False, "send every run, and the sweep, to the tracker again from the local files")


@dataclass
class ReportConfig:
    """Everything `python -m llama_ft.report` can be told beside folders."""

    tracker: UploadConfig = field(default_factory=UploadConfig)
