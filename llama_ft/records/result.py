"""`result.json`: the result of a run, however it ends."""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llama_ft.config import DataConfig, TrainConfig, UserError, path_of
from llama_ft.config.checks import Settings
from llama_ft.config.techniques import combination_name
from llama_ft.files import CHAT_TEMPLATE
from llama_ft.records import SCHEMA_VERSION, read_record, write_record

RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
LOG_FILE = "train.log"
MACHINE = "other_machine_"  # begins the names of folders with the logs of other machines than the run's first
BUILTIN_TEMPLATES = (None, "chat", "alpaca", "plain")  # any other one is a file, of which the run keeps a copy
FINISHED = ("ok", "oom")  # not to be measured again

Status = Literal["ok", "oom", "killed", "interrupted", "error"]


@dataclass(frozen=True)
class MemoryItem:
    """A part of the memory at the peak: the tensors of one category and dtype."""

    category: str
    dtype: str
    mib: float
    item: str | None = None  # what it is, if the category does not tell


@dataclass
class CardFacts:
    """Facts about the GPU that a run was measured on. None is unknown."""

    index: int  # as PyTorch counts those that it sees
    driver: str | None = None
    cudnn: int | None = None  # such as 91900 for 9.19.0
    attention_kernel: str | None = None  # flash, efficient, cudnn or math, in training
    matmul_precision: str | None = None  # of fp32 products: highest is fp32 itself, high is TF32
    allocator: str | None = None  # PYTORCH_ALLOC_CONF
    n_alloc_retries: int | None = None  # how often the allocator freed its cache to find room, which costs time
    n_ooms: int | None = None
    others_mib: float | None = None  # in use by other processes when the run began
    context_mib: float | None = None  # in use by the run at its end outside the allocator: context, libraries, kernels
    context_growth_mib: float | None = None  # the part that came after the run had chosen its device
    sm_clock_mhz: int | None = None  # of the multiprocessors, right after the last step
    max_sm_clock_mhz: int | None = None
    mean_power_w: float | None = None  # of the whole GPU while the run trained


@dataclass
class RankUse:
    """Memory used by one process of a run."""

    peak_memory_mib: float
    peak_rss_mib: float | None
    peak_phase: str
    memory_mib: dict[str, float]
    memory_max_mib: dict[str, float]
    breakdown: list[MemoryItem]
    peak_memory_reserved_mib: float | None = None


@dataclass
class Result:
    """The result of a run. None was not measured."""

    combination: str
    model: str
    data: str
    gpu: str  # the profile
    optim: dict[str, bool]
    techniques: dict[str, Settings]  # the numbers of each technique
    micro_batch_size: int
    command: str
    status: Status = "error"
    error: str | None = None
    config_hash: str | None = None  # None for a run that was refused before it began
    settings_hash: str | None = None  # equal for runs that differ only in their techniques
    packing: int | None = None  # most tokens of a row in which an update's samples were put end to end
    compiled: bool = False  # the layers were compiled
    template: str | None = None  # that formatted the records: alpaca, plain, chat or a file
    ends: str | None = None  # where texts begin and end, for display
    memory_limit_mib: int | None = None
    device: str | None = None
    compute_dtype: str | None = None
    runtime_s: float | None = None
    samples: int | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    joules_per_token: float | None = None  # of the whole GPU, or of all GPUs, if they report it
    peak_memory_mib: float | None = None
    peak_memory_reserved_mib: float | None = None  # of the CUDA allocator
    peak_rss_mib: float | None = None
    peak_phase: str | None = None  # phase of the peak: forward, backward, optimizer step or evaluation
    memory_mib: dict[str, float] | None = None  # by category, at the peak
    memory_max_mib: dict[str, float] | None = None  # by category, each one's own maximum
    breakdown: list[MemoryItem] = field(default_factory=list)  # the peak by category and dtype
    parallel: Settings | None = None  # the strategy and its processes; None if the run was not split
    ranks: list[RankUse] = field(default_factory=list)  # each process of a split run; the largest is above
    trainable_params: int | None = None
    total_params: int | None = None
    trainable_percent: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    train_loss_before: float | None = None  # of the first `loss_samples` training samples, without dropout
    train_loss_after: float | None = None
    loss_samples: int | None = None  # 8, or all if there are fewer
    eval_samples: int | None = None  # held out
    eval_loss_before: float | None = None  # their mean loss per target token, before the first step
    eval_loss: float | None = None  # of the saved weights: after `best_eval_step` with keep_best, else after the last
    eval_perplexity: float | None = None
    eval_token_accuracy: float | None = None  # share of the target tokens that the model finds most probable
    best_eval_loss: float | None = None
    best_eval_step: int | None = None  # optimizer steps done before it; 0 is before the first
    last_eval_loss: float | None = None
    last_eval_step: int | None = None
    eval_runtime_s: float | None = None  # of all held-out losses, not included in `runtime_s`
    stopped_early_at_step: int | None = None  # by training.patience
    has_diverged: bool = False  # the error is a loss or gradient that is NaN or infinite
    stopped_by: str | None = None  # a queue's signal, such as SIGUSR2: the run resumes when its job does
    skipped_steps: int | None = None
    resumed_at_step: int | None = None
    versions: dict[str, str | None] | None = None
    card: CardFacts | None = None  # of a run on a GPU
    schema_version: int = SCHEMA_VERSION


def new_result(config: TrainConfig, command: str) -> Result:
    """The result of a run that is about to begin."""
    result = unmeasured_result(config.to_dict(), command)
    result.config_hash, result.settings_hash = config.hash(), config.hash(without=("optim",))
    result.memory_limit_mib = config.memory_limit_mib
    return result


def unmeasured_result(settings: Settings, command: str, error: str | None = None) -> Result:
    """The result of a run from its settings only, with the `error` that kept it from starting, if any."""
    return Result(
        combination=combination_name(settings["optim"]),
        model=settings["model"]["name"],
        data=DataConfig(settings["data"]["name"], settings["data"]["path"]).title,
        gpu=settings["gpu"]["name"],
        optim=settings["optim"],
        techniques={name: settings[name] for name in settings["optim"]},
        micro_batch_size=settings["training"]["micro_batch_size"],
        packing=settings["training"].get("packing"),
        compiled=settings["training"].get("compile", False),
        parallel=parallel if (parallel := settings.get("parallel", {})).get("strategy", "none") != "none" else None,
        command=command,
        error=error,
    )


def write_result(run_dir: Path, result: Result, replaces: bool = True) -> None:
    """Write `result.json` atomically; unless it `replaces` another one, only if there is none."""
    if replaces or not (run_dir / RESULT_FILE).exists():
        write_record(result, run_dir / RESULT_FILE)


def read_result(run_dir: Path) -> Result | None:
    """Read the folder's result, None if it has none; a UserError if this version cannot have written it."""
    file = run_dir / RESULT_FILE
    if not file.is_file():
        return None
    result = read_record(Result, file)
    if not all(key in result.techniques.get(name, {}) for name, key in (("ga", "steps"), ("mp", "frozen_weights"))):
        raise UserError(f"{file} is damaged: ga.steps or mp.frozen_weights is missing in techniques")
    return result


def results_below(folder: Path) -> dict[Path, Result]:
    """The results in a folder and below it, by their folders, without copies."""
    files = {file: file.relative_to(folder).parts for file in sorted(folder.rglob(RESULT_FILE))}
    own = [f for f, parts in files.items() if not any(part == "wandb" or part.startswith(MACHINE) for part in parts)]
    return {file.parent: result for file in own if (result := read_result(file.parent))}


def template_of_run(folder: str | None) -> str | None:
    """The template that the run in a folder trained with: a name, or its file there; None if unknown."""
    path, result = path_of(folder or ""), None
    with suppress(UserError):  # written by another version, or by another program
        result = read_result(path) if folder else None
    if result is None or result.template in BUILTIN_TEMPLATES:
        return result.template if result else None
    if not (path / CHAT_TEMPLATE).is_file():
        problem = f"{folder} was trained with the template {result.template}, of which it has no copy"
        raise UserError(f"{problem}: give template=FILE, or for train and evaluate data.template=FILE")
    return str(path / CHAT_TEMPLATE)


def ran_on(result: Result, gpu: str, on_cuda: bool) -> bool:
    """Return True if a run was on a profile's device: any CPU for `cpu`, `NVIDIA A100` for `a100_40gb`."""
    is_on_cuda = result.peak_memory_reserved_mib is not None
    words = re.findall(r"[a-z]+|\d+", re.sub(r"_\d+gb$", "", gpu.lower()))
    # An L40 is not an L4, and a slice (MIG) is not a card.
    model = r"[^a-z\d]*".join(words) + r"\b(?! (?:ti|super|laptop)\b)(?!.* mig )"
    return is_on_cuda == on_cuda and (not on_cuda or bool(re.search(rf"\b{model}", (result.device or "").lower())))
