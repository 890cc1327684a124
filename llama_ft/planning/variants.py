"""The runs whose traces `will_it_fit.html` holds: every combination of techniques, on every kind of model and card."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from llama_ft.config import (
    DataConfig,
    Dtype,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Strategy,
    TrainConfig,
    UserError,
)
from llama_ft.config.model import PACKAGE_DIR
from llama_ft.config.techniques import (
    GradientAccumulationConfig,
    LoraConfig,
    MixedPrecisionConfig,
    combinations,
)
from llama_ft.config.training import Optimizer, TrainingConfig
from llama_ft.device import versions
from llama_ft.files import whole_file
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.layers import DEPTHS
from llama_ft.planning.operator_formulas import PARTS, costs
from llama_ft.planning.plain_kernels import plain_kernels
from llama_ft.planning.processes import side_by_side
from llama_ft.planning.symbols import Formula, Symbols
from llama_ft.planning.trace import trace
from llama_ft.system import Progress, no_progress

FEATURES = ("tie_word_embeddings", "qkv_bias", "qk_norm")
PLAIN = [(grouped, tied, False, False) for grouped in (False, True) for tied in (False, True)]  # LLaMA's own
# Of no built-in model: small ones of Qwen2.5 and Qwen3, which can be typed.
OTHERS = [(True, True, True, False), (True, True, False, True)]


@dataclass(frozen=True)
class Variant:
    """Runs that allocate the same storages in the same order, but for their sizes."""

    structure: tuple[bool, ...]  # grouped heads, then `FEATURES`
    has_bf16: bool  # the card has bf16, and so FlashAttention
    is_split: bool  # by FSDP
    packed: bool
    optim: OptimConfig
    mp: MixedPrecisionConfig
    optimizer: Optimizer
    is_ours: bool = True  # else another program's, with PyTorch's own kernels

    @property
    def key(self) -> str:
        """As the page composes it."""
        flags = "".join(str(int(flag)) for flag in (*self.structure, self.has_bf16, self.is_split, self.packed))
        frozen = self.mp.frozen_weights.name + ("" if self.mp.double_quantization else "_single")
        program = "llama_ft" if self.is_ours else "other"
        words = (self.optim.combination, frozen, self.mp.trainable_weights.name, self.optimizer.name, program)
        return " ".join((flags, *words))

    @cached_property
    def symbols(self) -> Symbols:
        """The sizes of the traced run."""
        return Symbols(self.structure[0], self.packed, self.is_split)

    @property
    def config(self) -> TrainConfig:
        """The traced run."""
        sizes, n_processes = self.symbols.sizes, self.symbols.sizes["processes"]
        # An update's samples are dealt to all processes: each gets one micro-batch, or with accumulation two.
        size, steps = (sizes["samples"], 2 * n_processes) if self.optim.ga else (sizes["samples"] * n_processes, 1)
        features = dict(zip(FEATURES, self.structure[1:], strict=True))
        packing = sizes["samples"] * sizes["tokens"] if self.packed else None
        return TrainConfig(
            self.symbols.model(DEPTHS[0], **features),
            "random",
            "no.model",
            self.optim,
            data=DataConfig("sample"),
            ga=GradientAccumulationConfig(steps),
            mp=self.mp,
            lora=LoraConfig(rank=sizes["rank"]),
            training=TrainingConfig(micro_batch_size=size, packing=packing, optimizer=self.optimizer),
            parallel=ParallelConfig(Strategy.fsdp, n_processes) if self.is_split else ParallelConfig(),
        )


def structure_of(model: ModelConfig) -> tuple[bool, ...]:
    """The parts of a model that change more than sizes."""
    return (model.n_kv_heads < model.n_heads, *(getattr(model, name) for name in FEATURES))


def variants(structures: Iterable[tuple[bool, ...]]) -> Iterator[Variant]:
    """All variants that a page can show: those that `train` accepts."""
    for structure, optim, is_split in product(sorted(structures), combinations(["gc"]), (False, True)):
        optimizers = [Optimizer.adamw] if is_split or optim.lora else [Optimizer.adamw, Optimizer.adamw_8bit]
        for mp, optimizer, has_bf16 in product(formats(optim), optimizers, (True, False)):
            if has_bf16 or (optim.mp and mp.trainable_weights is Dtype.fp32):  # without MP all cards are alike
                plain = Variant(structure, has_bf16, is_split, False, optim, mp, optimizer)
                # Without FlashAttention each sample of a packed row is a call of its own: not on the page.
                yield plain
                if has_bf16 and optim.mp:
                    yield replace(plain, packed=True)
                if has_bf16 and not is_split and optimizer is Optimizer.adamw and structure in PLAIN:
                    yield replace(plain, is_ours=False)


def formats(optim: OptimConfig) -> list[MixedPrecisionConfig]:
    """The formats of weights that matter to a combination."""
    frozen = [Dtype.compute, Dtype.fp32, Dtype.nf4] if optim.mp and optim.lora else [Dtype.compute]
    trainable = [Dtype.fp32, Dtype.compute] if optim.mp else [Dtype.fp32]
    found = [MixedPrecisionConfig(frozen_weights=f, trainable_weights=t) for f, t in product(frozen, trainable)]
    return found + [replace(mp, double_quantization=False) for mp in found if mp.frozen_weights is Dtype.nf4]


def traced(variant: Variant) -> dict[str, Any]:
    """A variant's storages and operators, in JSON's types."""
    traits = Traits(True, variant.has_bf16)
    with nullcontext() if variant.is_ours else plain_kernels():
        found = trace(variant.config, traits, variant.symbols)
        parts = costs(variant.config, traits, variant.symbols)
    return {
        "kinds": [[formula_json(kind.n_bytes), kind.category, kind.dtype] for kind in found.kinds],
        "sections": [[each.phase, each.once, each.layer] for each in found.sections],
        "costs": [
            [
                [
                    cost.dtype,
                    formula_json((cost.flops,) if cost.flops else ()),
                    formula_json(cost.n_bytes),
                    cost.count,
                    cost.per_layer,
                ]
                for cost in parts[part]
            ]
            for part in PARTS
        ],
    }


def all_traced(
    structures: Iterable[tuple[bool, ...]], kept: Path, progress: Progress = no_progress
) -> dict[str, dict[str, Any]]:
    """The traces of all variants, by key.

    Each is kept in a file as soon as it is made, so that a run that was stopped continues there; one of another version
    or of other code begins anew. A UserError if the file is somebody else's.
    """
    wanted = {variant.key: variant for variant in variants(structures)}
    found = read_kept(kept)
    missing = {key: (variant,) for key, variant in wanted.items() if key not in found}
    with whole_file(kept) as file:  # without a line that was cut
        lines = (json.dumps(line, separators=(",", ":")) for line in (made_by(), *found.items()))
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with kept.open("a", encoding="utf-8") as file, progress("traces", len(wanted)) as advance:
        advance(len(wanted) - len(missing))
        for key, each in side_by_side(traced, missing):
            found[key] = each
            print(json.dumps([key, each], separators=(",", ":")), file=file, flush=True)
            advance(1)
    return {key: found[key] for key in wanted}


def read_kept(file: Path) -> dict[str, dict[str, Any]]:
    """The traces in a file; none if it is not there, or of other code. A cut line is left out."""
    if not file.exists():
        return {}
    first, *lines = file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if not first.startswith('{"traces":'):
        raise UserError(f"{file} is there, and llama_ft did not write it: move it, or name another page")
    found: dict[str, dict[str, Any]] = {}
    with suppress(ValueError):
        if json.loads(first) == made_by():
            for line in lines:
                key, each = json.loads(line)
                found[key] = each
    return found


def made_by() -> dict[str, str | None]:
    """The code that traces come from: a hash of the library's, and the versions."""
    code = hashlib.sha256()
    for part in ("kernels.py", "measure", "model", "parallel", "planning", "techniques", "training"):
        for file in sorted((PACKAGE_DIR / part).rglob("*.py")) or [PACKAGE_DIR / part]:
            code.update(file.read_bytes())
    return {"traces": code.hexdigest(), **versions()}


def formula_json(formula: Formula) -> list[list[float]]:
    """A sum's terms, each its factor and its powers."""
    return [[term.factor, *term.powers] for term in formula]
