"""Compare the planner with others' published numbers for LLaMA-2: `python -m benchmarks.plan_published DIR`.

Measured: LitGPT's runs on an A100 of 40 GB (torch 2.1, October 2023; tutorials/resource-tables.md and
tutorials/finetune_lora.md of github.com/Lightning-AI/litgpt): LoRA of rank 8 on queries and values, no gradient
checkpointing, Alpaca, whose longest sample has 1,304 tokens there. It prints reserved memory in GB of 10**9 bytes.
Its PyTorch had no expandable segments, with which our runs reserve less: both are planned. Its bitsandbytes needlessly
kept the input of each product with 4-bit weights until the backward pass (bitsandbytes pull request 1270, of July
2024). So does this plan; our own runs do not.

Computed: the bytes of all tensors of LLaMA-2-7B, from another implementation on fake tensors with transformers' model,
for a sample of 405 tokens of which 337 are trained on: the longest of Alpaca's first 200.

All are planned with norms, SwiGLU and loss differentiated by PyTorch, like theirs; our own keep less.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.native_allocator import native_reserved_bytes
from llama_ft import cli
from llama_ft.config import PlanConfig
from llama_ft.files import write_text
from llama_ft.plan import overrides
from llama_ft.planning.allocator import reserved_bytes
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.gpu_traits import traits_of, workspace_bytes
from llama_ft.planning.lengths import blank_samples
from llama_ft.planning.plain_kernels import plain_kernels
from llama_ft.system import MIB

FOUR_BIT = "mp.frozen_weights=nf4"
COMMON = "gpu=a100_40gb training=course"
PURE_BF16 = "optim=mp_lora mp.trainable_weights=compute lora.rank=8 data.max_length=1304"
MIXED = "optim=mp_lora mp.frozen_weights=fp32 lora.rank=8 data.max_length=1304"
GB = 1e9
OTHER_LENGTHS = (405, 68)  # tokens, and those of the prompt


@dataclass(frozen=True)
class Published:
    """Somebody else's run."""

    name: str
    arguments: str  # of `plan`, in addition to COMMON
    gb: float | None  # reserved memory; None if it ran out of memory
    tolerance: float = 0.05


@dataclass(frozen=True)
class Computed:
    """Memory computed by somebody else."""

    arguments: str
    gib: float  # of tensors, at the peak
    digits: int  # after the decimal point
    tolerance: float


LITGPT = [
    Published("7B, bf16-mixed, micro-batch 1", f"model=llama2_7b {MIXED}", None),
    Published("7B, bf16-true, micro-batch 1", f"model=llama2_7b {PURE_BF16}", 21.30),
    Published("7B, bf16-true, micro-batch 2", f"model=llama2_7b {PURE_BF16} training.micro_batch_size=2", 29.07),
    Published("7B, bf16-true, micro-batch 4", f"model=llama2_7b {PURE_BF16} training.micro_batch_size=4", None),
    Published("13B, bf16-true, micro-batch 1", f"model=llama2_13b {PURE_BF16}", 38.12),
    Published("13B, bf16-true, micro-batch 2", f"model=llama2_13b {PURE_BF16} training.micro_batch_size=2", None),
    Published("13B, bf16-true, micro-batch 4", f"model=llama2_13b {PURE_BF16} training.micro_batch_size=4", None),
]
LITGPT += [
    Published(f"{size}, NF4{name}, micro-batch 1", f"model=llama2_{size.lower()} {PURE_BF16} {FOUR_BIT}{more}", *found)
    for size, name, more, *found in (
        ("7B", "", " mp.double_quantization=false", 14.14),
        ("7B", ", double quantization", "", 13.84),
        ("13B", "", " mp.double_quantization=false", 23.14),
        ("13B", ", double quantization", "", 22.55, 0.06),
    )
]
OTHERS = [
    Computed("optim=baseline", 100.4, 1, 0.03),
    Computed("optim=ga", 105, 0, 0.03),
    Computed("optim=ga_mp", 116, 0, 0.03),
    Computed("optim=lora", 29, 0, 0.03),
    Computed("optim=mp_lora mp.frozen_weights=fp32", 39.8, 1, 0.03),
    Computed("optim=mp_lora", 14.8, 1, 0.10),
    Computed("optim=mp_lora optim.gc=true", 12.9, 1, 0.10),
]


def planned(arguments: str, lengths: tuple[int, int]) -> dict[str, Any]:
    """The plan for samples of one length."""
    config = cli.composed_config("plan", overrides(f"{COMMON} {arguments}".split()), PlanConfig)
    with plain_kernels():
        run = fake_run(config, blank_samples([lengths] * 8), traits_of(config.gpu))
    reserved = native_reserved_bytes(run.events, workspace_bytes(config.gpu))
    fits = reserved / MIB <= config.gpu.usable_mib
    return {
        "peak_mib": run.use.peak_mib,
        "reserved_mib": reserved / MIB,
        "reserved_expandable_mib": reserved_bytes(run.events, workspace_bytes(config.gpu)) / MIB,
        "fits": fits,
        "memory_mib": run.use.at_peak_mib,
    }


def litgpt(run: Published) -> dict[str, Any]:
    """A run of LitGPT, measured and planned; all of its samples' tokens but BOS are trained on, the worst case."""
    found = planned(run.arguments, (1304, 1))
    gb = found["reserved_mib"] * MIB / GB
    error = None if run.gb is None else gb / run.gb - 1
    return {"name": run.name, "plan": run.arguments, "measured_gb": run.gb, "planned_gb": gb, "error": error} | found


def other(run: Computed) -> dict[str, Any]:
    """A row computed by another implementation, and ours."""
    found = planned(f"model=llama2_7b {run.arguments}", OTHER_LENGTHS)
    gib = found["peak_mib"] / 1024
    return {"plan": run.arguments, "theirs_gib": run.gib, "ours_gib": gib, "difference": gib / run.gib - 1} | found


def tables(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Both tables in Markdown."""
    lines = [
        "| LitGPT on an A100 of 40 GB | reserved, GB | planned, GB | error | fits, planned | expandable segments, GB |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for each in runs:
        gb = "out of memory" if each["measured_gb"] is None else f"{each['measured_gb']:.2f}"
        error = "" if each["error"] is None else f"{each['error']:+.1%}"
        expandable = each["reserved_expandable_mib"] * MIB / GB
        cells = [each["name"], gb, f"{each['planned_gb']:.2f}", error, "yes" if each["fits"] else "×"]
        lines.append(f"| {' | '.join(cells)} | {expandable:.2f} |")
    lines += ["", "| LLaMA-2-7B, 405 tokens | theirs, GiB | ours, GiB | difference |", "|---|---:|---:|---:|"]
    for computed, each in zip(OTHERS, others, strict=True):
        theirs, ours = (f"{each[key]:.{computed.digits}f}" for key in ("theirs_gib", "ours_gib"))
        lines.append(f"| {each['plan']} | {theirs} | {ours} | {each['difference']:+.1%} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Write and print the tables."""
    folder = Path(sys.argv[1])
    runs, others = [litgpt(run) for run in LITGPT], [other(run) for run in OTHERS]
    write_text(folder / "published.json", json.dumps({"litgpt": runs, "others": others}, indent=1) + "\n")
    write_text(folder / "published.md", tables(runs, others))
    print(tables(runs, others))


if __name__ == "__main__":
    main()
