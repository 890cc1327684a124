"""The registry of techniques: their names, settings and the functions that apply them.

Each field of `TechniqueConfigs` is one technique. Its switch `optim.NAME`, its label, the combinations, the rows of
tables and plans, and the advice all follow from that field.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from itertools import product
from typing import Any

from llama_ft.config.checks import Dtype, Offload, Policy, check, check_settings, setting

BASELINE = "baseline"  # the combination with every technique off


@dataclass(frozen=True)
class Technique:
    """One technique."""

    name: str  # of its switch `optim.NAME` and of its section of the config
    label: str  # its name in tables
    meaning: str  # of the switch, for `--help`
    # `module:function` that changes a model in place, called with the model, the section and the run's `Precision`.
    # None if the technique changes no module: the training step then gets it as a value.
    apply: str | None = None
    # Of a micro-batch. Combinations that differ only in techniques that do not are planned from the same fake steps.
    changes_operators: bool = True
    in_course: bool = False  # in the course's Table 2: always has a column, and presets in `conf/optim`
    saves: bool = True  # memory or time; advice and Table 1, which compare savings, leave out the others


def technique(section: type, label: str, meaning: str, apply: str | None = None, **about: Any) -> Any:
    """Return a field of `TechniqueConfigs`: a technique's settings, and the values of its `Technique`."""
    return field(default_factory=section, metadata={"label": label, "meaning": meaning, **about, "apply": apply})


@dataclass
class GradientAccumulationConfig:
    """Gradient accumulation (`optim.ga`)."""

    steps: int = setting(8, "micro-batches in an optimizer step")

    def __post_init__(self) -> None:
        check(self.steps >= 1, "ga.steps", self.steps, "at least 1")


@dataclass
class MixedPrecisionConfig:
    """Mixed precision (`optim.mp`), with separate dtypes for computation, frozen and trainable weights."""

    dtype: Dtype = setting(Dtype.auto, "16-bit format; auto is bf16 if the device has it, else fp16", "auto bf16 fp16")
    frozen_weights: Dtype = setting(
        Dtype.compute,
        "storage of frozen weights; fp32 is plain AMP; nf4 and fp4 store linear layers in 4 bits (QLoRA)",
        "compute fp32 nf4 fp4",
        needs="optim.lora=true",
    )
    double_quantization: bool = setting(
        True, "quantize the scales of 4-bit weights too, to 8 bits", needs="mp.frozen_weights=nf4|fp4"
    )
    trainable_weights: Dtype = setting(Dtype.fp32, "storage of trainable weights; fp32: master weights", "compute fp32")

    def __post_init__(self) -> None:
        check_settings(self, "mp.")
        fp16_masters = self.dtype is not Dtype.fp16 or self.trainable_weights is Dtype.fp32
        check(fp16_masters, "mp.trainable_weights", "compute", "fp32 with mp.dtype=fp16 (gradients cannot be unscaled)")


@dataclass
class LoraConfig:
    """Low-rank adaptation (`optim.lora`)."""

    rank: int = setting(16, "r, the inner size of the two factors")
    alpha: float = setting(32.0, "the update is scaled by alpha / rank")
    rslora: bool = setting(False, "the update is scaled by alpha / sqrt(rank) instead (rsLoRA)")
    dropout: float = setting(0.05, "share of the adapter's inputs that is zeroed in training")
    targets: list[str] = setting(["wq", "wv"], "the linear layers that get an adapter: wq wk wv wo w1 w2 w3 output")

    def __post_init__(self) -> None:
        check(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        check(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "positive and finite")
        check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0 and below 1")
        check(len(self.targets) > 0, "lora.targets", self.targets, "one name or more, such as [wq,wv]")


@dataclass
class GradientCheckpointingConfig:
    """Gradient checkpointing (`optim.gc`)."""

    every: int = setting(1, "keep the input of every n-th block", at_least=1)
    policy: Policy = setting(Policy.full, "full recomputes a whole block, selective all but its large matrix products")
    offload: Offload | None = setting(None, "cpu keeps the blocks' inputs in host memory; null: on the device")

    def __post_init__(self) -> None:
        check_settings(self, "gc.")


@dataclass
class NeftuneConfig:
    """NEFTune (`optim.neft`)."""

    alpha: float = setting(5.0, "noise on embeddings is up to alpha / sqrt(tokens x model.dim); the paper uses 5 to 15")

    def __post_init__(self) -> None:
        check(0 < self.alpha < math.inf, "neft.alpha", self.alpha, "positive and finite")


@dataclass
class TechniqueConfigs:
    """The techniques, in the order in which they are applied.

    LoRA comes before checkpointing: it replaces modules, and checkpointing runs the final ones.
    """

    ga: GradientAccumulationConfig = technique(
        GradientAccumulationConfig, "GA", "gradient accumulation", changes_operators=False, in_course=True
    )
    mp: MixedPrecisionConfig = technique(MixedPrecisionConfig, "MP", "mixed precision", in_course=True)
    lora: LoraConfig = technique(LoraConfig, "LoRA", "LoRA", apply="llama_ft.techniques.lora:apply", in_course=True)
    gc: GradientCheckpointingConfig = technique(
        GradientCheckpointingConfig,
        "GC",
        "gradient checkpointing",
        apply="llama_ft.techniques.gradient_checkpointing:apply",
    )
    neft: NeftuneConfig = technique(
        NeftuneConfig,
        "NEFT",
        "NEFTune, noise on the embeddings in training",
        apply="llama_ft.techniques.neftune:apply",
        saves=False,
    )


TECHNIQUES = tuple(Technique(each.name, **each.metadata) for each in fields(TechniqueConfigs))
COURSE = tuple(each for each in TECHNIQUES if each.in_course)
LABELS = {each.name: each.label for each in TECHNIQUES}


# Any: its fields are known only at run time.
_Switches: Any = make_dataclass("_Switches", [(each.name, bool, setting(False, each.meaning)) for each in TECHNIQUES])


class OptimConfig(_Switches):  # type: ignore[misc]
    """A switch for each technique."""

    @property
    def combination(self) -> str:
        """The techniques that are on, joined by `_`; `baseline` if none is."""
        return combination_name(asdict(self))

    @property
    def as_typed(self) -> str:
        """The combination as typed: a preset, and the switches of techniques that have no presets."""
        preset = combination_name({each.name: getattr(self, each.name) for each in COURSE})
        others = [f"optim.{each.name}=true" for each in TECHNIQUES if not each.in_course and getattr(self, each.name)]
        return " ".join([f"optim={preset}", *others])


@dataclass
class Switched:
    """The switches, as a section of the config."""

    optim: OptimConfig = field(default_factory=OptimConfig)


def combination_name(switches: dict[str, bool]) -> str:
    """The names of the techniques that are on, joined by `_`; `baseline` if none is."""
    return "_".join(name for name, on in switches.items() if on) or BASELINE


def combination_label(switches: dict[str, bool]) -> str:
    """A combination's name for display, such as `GA+MP+LoRA`."""
    return "+".join(each.label for each in TECHNIQUES if switches.get(each.name)) or BASELINE


def table_order(switches: dict[str, bool]) -> tuple[bool, ...]:
    """Sort key: the order of the course's Table 2, combinations with other techniques last."""
    others = [each for each in TECHNIQUES if not each.in_course]
    return tuple(switches.get(each.name, False) for each in (*others, *COURSE))


def shown_techniques(combinations: Iterable[dict[str, bool]]) -> list[Technique]:
    """Techniques with a row in a table's heading: the course's, and the others that are on in a combination."""
    rows = list(combinations)
    return [each for each in TECHNIQUES if each.in_course or any(row.get(each.name) for row in rows)]


def combinations(varied: Iterable[str] = (), among: Iterable[Technique] = COURSE) -> Iterator[OptimConfig]:
    """Yield every combination of the techniques `among` and those named in `varied`, in the table's order."""
    names = [*varied, *(each.name for each in among)]
    for on in product((False, True), repeat=len(names)):
        yield OptimConfig(**dict(zip(names, on, strict=True)))
