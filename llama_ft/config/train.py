"""The settings of `python -m llama_ft.train`."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from llama_ft.config.checks import DeviceChoice, Dtype, Policy, Settings, UserError, literal, readable, setting
from llama_ft.config.content import content_hash
from llama_ft.config.groups import GpuConfig, MeasureConfig, PlanCheckConfig, TrackerConfig
from llama_ft.config.parallel import ParallelConfig, Strategy
from llama_ft.config.source import ModelSource, RecordsSource
from llama_ft.config.techniques import TECHNIQUES, Switched, TechniqueConfigs
from llama_ft.config.training import SweepConfig, TrainingConfig

# Keys added after the first runs were hashed. A run with these values keeps its hash: they are left out of it.
LATER: Settings = {
    "columns": {}, "subset": None, "split": None, "on_long": "truncate", "template": "auto", "train_on": "assistant",
    "adapter": None, "packing": None, "compile": False, "validation": None, "schedule": "cosine", "optimizer": "adamw",
    "eval_every": None, "keep_best": False, "patience": None, "optimizer_in_backward": False, "neft": {"alpha": 5.0},
    "double_quantization": True, "policy": "full", "offload": None,
    "parallel": {"strategy": "none", "processes": 2, "nodes": 1},
}  # fmt: skip
NAMES = ("tracker", "plan", "sweep", "recipe")  # sections and keys that do not change the run itself


def read_config(file: Path) -> "TrainConfig":
    """Read a run's `config.yaml` and check it again; a UserError names a damaged file."""
    import yaml
    from omegaconf import OmegaConf

    with readable(file):
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), literal(yaml.safe_load(file.read_bytes())))
        return cast(TrainConfig, OmegaConf.to_object(merged))


@dataclass
class TrainConfig(RecordsSource, TechniqueConfigs, Switched, ModelSource):
    """All settings of `train`."""

    adapter: str | None = setting(None, "folder (run or PEFT) of a LoRA adapter to train further; it sets lora's keys")
    training: TrainingConfig = field(default_factory=TrainingConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    plan: PlanCheckConfig = field(default_factory=PlanCheckConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    recipe: str | None = None  # the choice in conf/recipe, which sets other keys

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is not None and not self.optim.lora:
            raise UserError("adapter=DIR needs LoRA, and optim.lora is off: give optim=lora")
        if self.training.compile and self.optim.gc and self.gc.policy is Policy.selective:
            problem = "gc.policy=selective chooses among operators, and training.compile=true fuses those of a layer"
            raise UserError(f"{problem}: leave one of them out")
        self.gpu.check_is_one()
        self.check_optimizer()
        self.check_parallel()
        self.training.check_for(self.data.validation)
        self.sweep.check_for(self.data.validation)

    def check_optimizer(self) -> None:
        """Raise a UserError if the optimizer does not work with the techniques or the device."""
        device_type = "cpu" if self.gpu.device is DeviceChoice.cpu else "cuda"
        in_fp16 = self.optim.mp and self.mp.dtype is Dtype.fp16
        self.training.check_on(device_type, self.accumulation_steps, in_fp16)

    def check_parallel(self) -> None:
        """Raise a UserError for settings that a run on several processes does not support."""
        name, training = self.parallel.strategy.name, self.training
        if self.parallel.is_split and (training.compile or training.optimizer_in_backward):
            key = "compile" if training.compile else "optimizer_in_backward"
            raise UserError(f"training.{key}=true needs a single process, not parallel={name}: leave one of them out")
        if self.parallel.is_split and self.gpu.index is not None:
            raise UserError(f"gpu.index names one GPU, and parallel={name} uses several: set CUDA_VISIBLE_DEVICES")
        if self.parallel.strategy is Strategy.fsdp and training.optimizer.name.endswith("8bit"):
            why = "parallel=fsdp would cut its blocks of moments"
            raise UserError(f"training.optimizer={training.optimizer.name}: {why}; use training.optimizer=adamw")

    @property
    def used_techniques(self) -> set[str]:
        """The techniques whose settings have an effect: those that are on."""
        return {each.name for each in TECHNIQUES if getattr(self.optim, each.name)}

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in an optimizer step; 1 without gradient accumulation."""
        return self.ga.steps if self.optim.ga else 1

    @property
    def memory_limit_mib(self) -> int | None:
        """The run's memory limit: the given one or that of the card's profile, whichever is smaller."""
        limits = [limit for limit in (self.measure.memory_limit_mib, self.gpu.usable_mib) if limit is not None]
        return min(limits, default=None)

    def to_yaml(self) -> str:
        """The resolved config, for `config.yaml`; `read_config` reads it back unchanged."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    def measured(self, without: tuple[str, ...] = ()) -> Settings:
        """The settings that identify a run: equal for equal runs on equal files, wherever the files are.

        `without` leaves out sections of the config, and keys by their full name.
        """
        measured = {key: value for key, value in self.to_dict().items() if key not in (*NAMES, *without)}
        # They do not change what a run computes.
        kept = (
            "training.save_every",
            "training.resume",
            "data.cache_dir",
            "gpu.index",
            "gpu.shared",
            "parallel.rendezvous",
            "parallel.timeout_s",
        )
        for section, _, name in (key.partition(".") for key in (*kept, *without) if "." in key):
            measured.get(section, {}).pop(name, None)
        measured["model"] = self.model.sizes  # without the name: the weights' content is hashed
        files = {"builtin": str(self.model.builtin_dir)}
        data, training = measured["data"], measured["training"]
        data["columns"] = self.data.columns.given
        later = LATER | ({"momentum": training["momentum"]} if training["optimizer"] != "sgd" else {})
        if not self.optim.neft and "optim" in measured:
            del measured["optim"]["neft"]
        for part in (measured, training, data, measured.get("mp", {}), measured.get("gc", {})):
            for key in later.keys() & part.keys():
                if part[key] == later[key]:
                    del part[key]
        data["path"] = content_hash(data["path"], data=True) if data["path"] else None
        if "validation" in data and self.data.drawn_validation is None:
            data["validation"] = content_hash(data["validation"], data=True)
        named = [(measured, key) for key in ("tokenizer", "checkpoint", "adapter") if key in measured]
        for holder, key in [(data, "template")] * ("template" in data) + named:
            holder[key] = content_hash(files.get(holder[key], holder[key])) if holder[key] else None
        return measured

    @property
    def run_hash(self) -> str:
        """Equal for two runs if one can resume the other: they may differ in their end and in the number of cards."""
        return self.hash(without=("training.epochs", "training.patience", "parallel"))

    def hash(self, without: tuple[str, ...] = ()) -> str:
        """16 hex digits of the hash of `measured`."""
        return hashlib.sha256(json.dumps(self.measured(without), sort_keys=True).encode()).hexdigest()[:16]
