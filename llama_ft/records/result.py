"""`result.json`: what a run leaves behind, however it ends."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llama_ft.config import DataConfig, TrainConfig, UserError
from llama_ft.config.checks import Settings
from llama_ft.config.techniques import combination_name
from llama_ft.files import CHAT_TEMPLATE
from llama_ft.records import SCHEMA_VERSION, read_record, write_record

RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
LOG_FILE = "train.log"
MACHINE = "other_machine_"  # begins the names of folders with the logs of other machines than the run's first
BUILTIN_TEMPLATES = (None, "chat", "alpaca", "plain")  # of another one, a file, the run keeps a copy
FINISHED = ("ok", "oom")  # not to be measured again

Status = Literal["ok", "oom", "killed", "interrupted", "error"]


@dataclass(frozen=True)
class MemoryItem:
    """A part of the memory at the peak: the tensors of one category and dtype."""

    category: str
    dtype: str
    mib: float
    item: str | None = None  # what it is, where the category alone does not say


@dataclass
class CardFacts:
    """What is known of the GPU that a run was measured on. None is not known."""

    index: int  # as PyTorch counts those that it sees
    driver: str | None = None
    cudnn: int | None = None  # such as 91900 for 9.19.0
    attention_kernel: str | None = None  # flash, efficient, cudnn or math, in training
    matmul_precision: str | None = None  # of fp32 products: highest is fp32 itself, high is TF32
    allocator: str | None = None  # PYTORCH_ALLOC_CONF
    n_alloc_retries: int | None = None  # how often the allocator gave its cache back to find room, which takes time
    n_ooms: int | None = None
    others_mib: float | None = None  # in use by other processes when the run began
    context_mib: float | None = None  # in use by the run at its end outside the allocator: context, libraries, kernels
    context_growth_mib: float | None = None  # how much of that came after the run had chosen its device
    sm_clock_mhz: int | None = None  # of the multiprocessors, right after the last step
    max_sm_clock_mhz: int | None = None
    mean_power_w: float | None = None  # of the whole GPU while the run trained


@dataclass
class RankUse:
    """What one process of a run took."""

    peak_memory_mib: float
    peak_rss_mib: float | None
    peak_phase: str
    memory_mib: dict[str, float]
    memory_max_mib: dict[str, float]
    breakdown: list[MemoryItem]
    peak_memory_reserved_mib: float | None = None


@dataclass
class Result:
    """A run. What it did not come to measure is None."""

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
    settings_hash: str | None = None  # equal for runs that differ in their techniques alone
    packing: int | None = None  # tokens up to which the samples of an update were laid end to end
    compiled: bool = False  # whether the layers were
    template: str | None = None  # in which records were written down: alpaca, plain, chat or a file
    ends: str | None = None  # where texts begin and end, for people
    memory_limit_mib: int | None = None
    device: str | None = None
    compute_dtype: str | None = None
    runtime_s: float | None = None
    samples: int | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    joules_per_token: float | None = None  # of the whole GPU, or of all of them, where they tell
    peak_memory_mib: float | None = None
    peak_memory_reserved_mib: float | None = None  # of the CUDA allocator
    peak_rss_mib: float | None = None
    peak_phase: str | None = None  # what ran when memory peaked: forward, backward, optimizer step or evaluation
    memory_mib: dict[str, float] | None = None  # by category, at the peak
    memory_max_mib: dict[str, float] | None = None  # by category, each one's own maximum
    breakdown: list[MemoryItem] = field(default_factory=list)  # the peak by category and dtype
    parallel: Settings | None = None  # the strategy and its processes; None where the run was not split
    ranks: list[RankUse] = field(default_factory=list)  # of a split run: each process, of which the largest is above
    trainable_params: int | None = None
    total_params: int | None = None
    trainable_percent: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    train_loss_before: float | None = None  # of the first `loss_samples` training samples, without dropout
    train_loss_after: float | None = None
    loss_samples: int | None = None  # 8, or all where there are fewer
    eval_samples: int | None = None  # held out
    eval_loss_before: float | None = None  # their mean loss per target token, before the first step
    eval_loss: float | None = None  # of what the run leaves: after `best_eval_step` with keep_best, else after the last
    eval_perplexity: float | None = None
    eval_token_accuracy: float | None = None  # share of the target tokens that are the most probable ones
    best_eval_loss: float | None = None
    best_eval_step: int | None = None  # optimizer steps done before it; 0 is before the first
    last_eval_loss: float | None = None
    last_eval_step: int | None = None
    eval_runtime_s: float | None = None  # of all held-out losses, which `runtime_s` does not hold
    stopped_early_at_step: int | None = None  # by training.patience
    has_diverged: bool = False  # whether the error is a loss, or a gradient, that is no number
    stopped_by: str | None = None  # a queue's signal, such as SIGUSR2: the run goes on when its job does
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
    """The result of a run by its settings alone, and why it never began if a value in them is not allowed."""
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


def write_result(run_dir: Path, result: Result) -> None:
    """Write `result.json` atomically."""
    write_record(result, run_dir / RESULT_FILE)


def read_result(run_dir: Path) -> Result | None:
    """The folder's result, None if it has none; a UserError if it is none that this version writes."""
    file = run_dir / RESULT_FILE
    if not file.is_file():
        return None
    result = read_record(Result, file)
    if not all(key in result.techniques.get(name, {}) for name, key in (("ga", "steps"), ("mp", "frozen_weights"))):
        raise UserError(f"{file} is damaged: ga.steps or mp.frozen_weights is missing in techniques")
    return result


def results_below(folder: Path) -> dict[Path, Result]:
    """The results in a folder and in those below it, by their folders; copies left out."""
    files = {file: file.relative_to(folder).parts for file in sorted(folder.rglob(RESULT_FILE))}
    own = [f for f, parts in files.items() if not any(part == "wandb" or part.startswith(MACHINE) for part in parts)]
    return {file.parent: result for file in own if (result := read_result(file.parent))}


def template_of_run(folder: str | None) -> str | None:
    """The template that the run in a folder trained with: a name, or its file there; None where that is not known."""
    path, result = Path(os.path.expanduser(folder or "")), None
    with suppress(UserError):  # of another version, or of another program
        result = read_result(path) if folder else None
    if result is None or result.template in BUILTIN_TEMPLATES:
        return result.template if result else None
    if not (path / CHAT_TEMPLATE).is_file():
        problem = f"{folder} was trained in the template {result.template}, of which it has no copy"
        raise UserError(f"{problem}: name that file with template=FILE, of train and evaluate data.template=FILE")
    return str(path / CHAT_TEMPLATE)


def ran_on(result: Result, gpu: str, on_cuda: bool) -> bool:
    """Whether a run was on a profile's device: any CPU is `cpu`; a card has its name, as `NVIDIA A100` `a100_40gb`."""
    is_on_cuda = result.peak_memory_reserved_mib is not None
    words = re.findall(r"[a-z]+|\d+", re.sub(r"_\d+gb$", "", gpu.lower()))
    # An L40 is no L4, nor is a slice a card.
    model = r"[^a-z\d]*".join(words) + r"\b(?! (?:ti|super|laptop)\b)(?!.* mig )"
    return is_on_cuda == on_cuda and (not on_cuda or bool(re.search(rf"\b{model}", (result.device or "").lower())))
