"""What `python -m llama_ft.train` can be told."""

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

# Keys that came after the first runs had been hashed, and the values with which a run is what it was before.
LATER: Settings = {
    "columns": {}, "subset": None, "split": None, "on_long": "truncate", "template": "auto", "train_on": "assistant",
    "adapter": None, "packing": None, "compile": False, "validation": None, "schedule": "cosine", "optimizer": "adamw",
    "eval_every": None, "keep_best": False, "patience": None, "optimizer_in_backward": False, "neft": {"alpha": 5.0},
    "double_quantization": True, "policy": "full", "offload": None,
    "parallel": {"strategy": "none", "processes": 2, "nodes": 1},
}  # fmt: skip
NAMES = ("tracker", "plan", "sweep", "recipe")  # sections and keys that do not change what is run


def read_config(file: Path) -> "TrainConfig":
    """The config in a run's `config.yaml`, checked again; a UserError names a damaged file."""
    import yaml
    from omegaconf import OmegaConf

    with readable(file):
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), literal(yaml.safe_load(file.read_bytes())))
        return cast(TrainConfig, OmegaConf.to_object(merged))


@dataclass
class TrainConfig(RecordsSource, TechniqueConfigs, Switched, ModelSource):
    """Everything `python -m llama_ft.train` can be told."""

    adapter: str | None = setting(None, "folder of a run, or of PEFT, whose LoRA adapter is trained further, as it is")
    training: TrainingConfig = field(default_factory=TrainingConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    plan: PlanCheckConfig = field(default_factory=PlanCheckConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    recipe: str | None = None  # of conf/recipe: a name for what it sets, and nothing beside

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is not None and not self.optim.lora:
            raise UserError("adapter=DIR is trained further with LoRA, and optim.lora is off: give optim=lora")
        if self.training.compile and self.optim.gc and self.gc.policy is Policy.selective:
            problem = "gc.policy=selective chooses among operators, and training.compile=true makes one of a layer"
            raise UserError(f"{problem}: leave one of them out")
        self.gpu.check_is_one()
        self.check_optimizer()
        self.check_parallel()
        self.training.check_for(self.data.validation)
        self.sweep.check_for(self.data.validation)

    def check_optimizer(self) -> None:
        """Raise a UserError where the optimizer does not go with the techniques, or with a device that is named."""
        device_type = "cpu" if self.gpu.device is DeviceChoice.cpu else "cuda"
        in_fp16 = self.optim.mp and self.mp.dtype is Dtype.fp16
        self.training.check_on(device_type, self.accumulation_steps, in_fp16)

    def check_parallel(self) -> None:
        """Raise a UserError for what a run on several processes does not do."""
        name, training = self.parallel.strategy.name, self.training
        if self.parallel.is_split and (training.compile or training.optimizer_in_backward):
            key = "compile" if training.compile else "optimizer_in_backward"
            raise UserError(f"training.{key}=true is for one process, and parallel={name}: leave one of them out")
        if self.parallel.is_split and self.gpu.index is not None:
            raise UserError(f"gpu.index names one GPU, and parallel={name} takes several: set CUDA_VISIBLE_DEVICES")
        if self.parallel.strategy is Strategy.fsdp and training.optimizer.name.endswith("8bit"):
            why = "whose blocks of moments the rows of a process would cut"
            raise UserError(f"training.optimizer={training.optimizer.name}, {why}, is not for parallel=fsdp: use adamw")

    @property
    def used_techniques(self) -> set[str]:
        """The techniques whose numbers matter: those that are on."""
        return {each.name for each in TECHNIQUES if getattr(self.optim, each.name)}

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in an optimizer step; 1 is gradient accumulation switched off."""
        return self.ga.steps if self.optim.ga else 1

    @property
    def memory_limit_mib(self) -> int | None:
        """The limit to run under: the one given or that of the card's profile, whichever is smaller."""
        limits = [limit for limit in (self.measure.memory_limit_mib, self.gpu.usable_mib) if limit is not None]
        return min(limits, default=None)

    def to_yaml(self) -> str:
        """The resolved config, for `config.yaml`; `read_config` reads it, and takes no text in it for anything else."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    def measured(self, without: tuple[str, ...] = ()) -> Settings:
        """What identifies a run: equal for equal runs on equal files, wherever they lie.

        `without` leaves out sections of the config, and keys by their full name.
        """
        measured = {key: value for key, value in self.to_dict().items() if key not in (*NAMES, *without)}
        # How a run is kept, and where; not what is run.
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
        measured["model"] = self.model.sizes  # and weights are in the hash, whatever they are called
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
        """Equal for runs of which one can resume the other: they may end elsewhere, on more or fewer cards."""
        return self.hash(without=("training.epochs", "training.patience", "parallel"))

    def hash(self, without: tuple[str, ...] = ()) -> str:
        """16 hex digits of what is measured."""
        return hashlib.sha256(json.dumps(self.measured(without), sort_keys=True).encode()).hexdigest()[:16]
