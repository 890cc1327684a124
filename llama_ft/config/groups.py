"""The config groups, one dataclass each, with every key's default and allowed values; the settings of `report`."""

import enum
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llama_ft.config.checks import DeviceChoice, OnBadRecord, OnLong, TrainOn, UserError, check, check_settings, setting
from llama_ft.config.model import ModelConfig

HELD_OUT_FILE = "held_out.jsonl"  # in a run's folder: the held-out records that it drew

# The tracker of runs; chosen as a group.
TrackerKind = enum.Enum("TrackerKind", ["wandb", "tensorboard", "disabled"])
# W&B's mode; `auto` is online if an API key is configured, else offline.
TrackerMode = enum.Enum("TrackerMode", ["auto", "online", "offline"])
WANDB = "tracker.kind=wandb"


@dataclass
class ColumnsConfig:
    """A file's own names for the keys of a record: `data.columns={instruction: question, output: answer}`."""

    instruction: str | None = setting(None, "the file's name for instruction; null is the same name")
    input: str | None = setting(None, "the file's name for input")
    output: str | None = setting(None, "the file's name for output")
    task: str | None = setting(None, "the file's name for task, by which evaluate groups its results")
    messages: str | None = setting(None, "the file's name for messages")
    conversations: str | None = setting(None, "the file's name for conversations")
    prompt: str | None = setting(None, "the file's name for prompt")
    completion: str | None = setting(None, "the file's name for completion")

    @property
    def given(self) -> dict[str, str]:
        """The file's names by llama_ft's; only those that differ."""
        return {ours: theirs for ours, theirs in vars(self).items() if theirs is not None}


@dataclass
class DataConfig:
    """Records to train on: the built-in set, a file or a folder, or a data set on the Hugging Face hub."""

    name: str = setting("???", "name of the data")
    path: str | None = setting(None, "JSON, JSONL, CSV, TSV, Parquet; a folder of datasets; hub:ORG/NAME[@REVISION]")
    subset: str | None = setting(None, "subset of a folder or a hub: data set; null if there is only one")
    split: str | None = setting(None, "split of a folder or a hub: data set; null is train")
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    url: str | None = setting(None, "where to download the file from if data.path is null", needs="data.path=null")
    git_blob_id: str | None = setting(
        None, "id of the download as git hash-object prints it; null accepts any file", needs="data.url data.path=null"
    )
    cache_dir: str = setting("~/.cache/llama_ft", "folder of downloaded files", needs="data.url data.path=null")
    first: int | None = setting(None, "use only the first n records of the file; null is all", at_least=1)
    max_length: int | None = setting(None, "longest sample in tokens; null is the model's context", at_least=2)
    on_long: OnLong = setting(OnLong.truncate, "cut longer samples, drop them, or stop the run; they are counted")
    template: str = setting(
        "auto",
        "chat (the checkpoint's own), alpaca, plain or a FILE in Jinja; auto is chat if there is one, else alpaca",
    )
    validation: str | None = setting(
        None, "held-out records: FILE, split:NAME of data.path, or a share (0.1) or number (40) of the records read"
    )
    train_on: TrainOn = setting(TrainOn.assistant, "the assistant's turns, all tokens, or only the last answer")
    on_bad_record: OnBadRecord = setting(OnBadRecord.error, "a bad record stops the run, or is skipped and counted")

    def __post_init__(self) -> None:
        check_settings(self, "data.")
        drawn, text = self.drawn_validation, self.validation
        holds = text is None or not re.fullmatch(r"[\d\s.,%+-]*|split:\s*|nan|inf", text)
        holds = holds if drawn is None else drawn >= 1 if isinstance(drawn, int) else 0 < drawn < 1
        allowed = "a share such as 0.1, a number of records such as 40, a file, or split:NAME"
        check(holds, "data.validation", text, allowed)

    @property
    def drawn_validation(self) -> int | float | None:
        """The number or share of the records read to hold out; None if `validation` is not a number."""
        text = self.validation or ""
        try:
            return int(text) if re.fullmatch("[0-9]+", text) else float(text)
        except ValueError:
            return None

    def check_not_held_out(self, command: str) -> None:
        """Raise a UserError if `validation` is given to a command that holds no records out."""
        if self.validation is not None:
            advice = f"give {command} data.path=FILE, such as {HELD_OUT_FILE} in the folder of a run that drew records"
            raise UserError(f"data.validation={self.validation} is for train and plan: {advice}")

    @property
    def is_builtin(self) -> bool:
        """True if the records ship with the package."""
        return self.name == "sample"

    @property
    def title(self) -> str:
        """Name for display: the file's if `path` replaces the built-in set, else `name`."""
        return Path(self.path).name if self.path and self.is_builtin else self.name

    def check_for(self, model: ModelConfig, needs_records: bool = True) -> None:
        """Raise a UserError if no records are given, or `max_length` exceeds the model's context."""
        if needs_records and self.path is None and self.url is None and not self.is_builtin:
            raise UserError(f"data={self.name} needs data.path=FILE: a file of records")
        limit, length = model.max_seq_len, self.max_length or model.max_seq_len
        check(length <= limit, "data.max_length", length, f"at most model.max_seq_len={limit}")


@dataclass
class MatrixRates:
    """The vendor's peak rates of dense matrix products in TFLOP/s; null if the card lacks the format."""

    fp32: float | None = setting(None, "peak rate in fp32, TFLOP/s")
    tf32: float | None = setting(None, "peak rate in TF32, TFLOP/s")
    fp16: float | None = setting(None, "peak rate in fp16 accumulated in fp32, TFLOP/s")
    bf16: float | None = setting(None, "peak rate in bf16, TFLOP/s")

    def __post_init__(self) -> None:
        for key, rate in asdict(self).items():
            check(rate is None or 0 < rate < math.inf, f"gpu.tflops.{key}", rate, "positive and finite, or null")


@dataclass
class GpuConfig:
    """The device to run on. A card's profile also states memory and rates; `auto` and `cpu` do not."""

    name: str = setting("???", "name of the card")
    device: DeviceChoice = setting(DeviceChoice.auto, "where to run; auto is CUDA if there is a GPU, else the CPU")
    memory_mib: int | None = setting(None, "MiB that PyTorch reports as the card's total memory", at_least=1)
    context_mib: int = setting(0, "MiB of it that the CUDA context and its libraries use before the first tensor")
    compute_capability: str | None = setting(None, "CUDA compute capability, such as 8.0")
    bandwidth_gb_s: float | None = setting(None, "peak memory bandwidth in 10**9 bytes per second")
    link_gb_s: float | None = setting(None, "bandwidth to another card, one way, in 10**9 bytes per second; for plan")
    tflops: MatrixRates = field(default_factory=MatrixRates)
    index: int | None = setting(
        None,
        "number of the GPU among the visible ones, in nvidia-smi's order; null: the first, in train the first free one",
        at_least=0,
        needs="gpu.device=auto|cuda",
    )
    shared: bool = setting(False, "share a GPU with other runs instead of waiting", needs="gpu.device=auto|cuda")

    def __post_init__(self) -> None:
        check_settings(self, "gpu.")
        below = self.memory_mib or math.inf
        check(0 <= self.context_mib < below, "gpu.context_mib", self.context_mib, "at least 0 and below gpu.memory_mib")
        version = self.compute_capability
        holds = version is None or re.fullmatch(r"\d+\.\d", version) is not None
        check(holds, "gpu.compute_capability", version, "two numbers such as '8.0', or null")
        for key, rate in {"bandwidth_gb_s": self.bandwidth_gb_s, "link_gb_s": self.link_gb_s}.items():
            check(rate is None or 0 < rate < math.inf, f"gpu.{key}", rate, "positive and finite")

    def check_is_one(self) -> None:
        """Raise a UserError for `gpu=all`, which only `plan` takes."""
        check(self.name != "all", "gpu", self.name, "one card, auto or cpu; all is only for plan")

    @property
    def usable_mib(self) -> int | None:
        """Memory that the allocator can use on this card; None without a card's profile."""
        return None if self.memory_mib is None else self.memory_mib - self.context_mib

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability as PyTorch gives it, such as (8, 0)."""
        if self.compute_capability is None:
            return None
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)


@dataclass
class PlanCheckConfig:
    """The plan that `train` makes of a run before starting it on a GPU."""

    enforce: bool = setting(
        True,
        "do not start a run that would not fit on the GPU; a sweep measures it anyway",
        needs="gpu.device=auto|cuda",
    )


@dataclass
class MeasureConfig:
    """The limit that a run is measured under."""

    memory_limit_mib: int | None = setting(
        None, "MiB that a run may use (CPU: its data segment, CUDA: the allocator); null is no limit", at_least=1
    )

    def __post_init__(self) -> None:
        check_settings(self, "measure.")


@dataclass
class TrackerConfig:
    """Weights & Biases, TensorBoard or nothing. Local files are written in any case."""

    kind: TrackerKind = setting(TrackerKind.wandb, "the tracker; tracker=NAME sets it")
    mode: TrackerMode = setting(
        TrackerMode.auto, "W&B's mode; auto: WANDB_MODE, else online with an API key, else offline", needs=WANDB
    )
    project: str | None = setting(None, "the W&B project; null is WANDB_PROJECT, else llama_ft", needs=WANDB)
    entity: str | None = setting(
        None, "the W&B user or team; null: WANDB_ENTITY, else the default of the API key", needs=WANDB
    )
    group: str | None = setting(None, "the W&B group; null is WANDB_RUN_GROUP, else the sweep's folder", needs=WANDB)
    tags: list[str] = setting([], "W&B tags, added to techniques, model and card; [] takes WANDB_TAGS", needs=WANDB)
    notes: str | None = setting(None, "text for the W&B run; null is WANDB_NOTES", needs=WANDB)
    artifacts: bool = setting(False, "log the adapter or weights that a run leaves as a W&B artifact", needs=WANDB)

    def __post_init__(self) -> None:
        holds = self.project is None or re.fullmatch(r"[^/\\#?%:]{1,128}", self.project) is not None
        check(holds, "tracker.project", self.project, "1 to 128 characters without / \\ # ? % :")


@dataclass
class UploadConfig(TrackerConfig):
    """The tracker for finished runs. A key that is not given has the value of each run's own config."""

    upload: bool = setting(False, "send every run and the sweep to the tracker again, from the local files")
    dashboard: bool = setting(False, "make a W&B dashboard of the sweep's runs, with wandb-workspaces")


# Which tables `report` writes: its own, or also those of the course.
ReportForm = enum.Enum("ReportForm", ["standard", "course"])


@dataclass
class ReportConfig:
    """All settings of `report`; its folders are arguments."""

    tracker: UploadConfig = field(default_factory=UploadConfig)
    form: ReportForm = setting(ReportForm.standard, "course: also write Tables 1 and 2 in the form of the course")
