"""What others measured or computed for LLaMA-2, beside what the planner says: `python -m benchmarks.plan_published`.

The measured runs are LitGPT's, on an A100 of 40 GB (torch 2.1, October 2023; tutorials/resource-tables.md and
tutorials/finetune_lora.md of github.com/Lightning-AI/litgpt): LoRA of rank 8 on queries and values, no gradient
checkpointing, Alpaca, whose longest sample has 1,304 tokens there. LitGPT prints what is reserved, in GB of 10**9
bytes. The computed figures are bytes of tensors in full-depth LLaMA-2-7B, found by an independent implementation
over transformers' model, at 405 tokens of which 337 are trained on (the longest of Alpaca's first 200).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from llama_ft import cli
from llama_ft.config import PlanConfig
from llama_ft.files import write_text
from llama_ft.plan import overrides
from llama_ft.planning.predict import Lengths, predict

LITGPT = "training=course data.max_length=1304 optim=lora lora.rank=8"
BF16_TRUE = f"{LITGPT} optim=mp_lora mp.trainable_weights=compute"
LONGEST = (405, 68)


@dataclass(frozen=True)
class Published:
    """A run of somebody else."""

    name: str
    arguments: str  # of `plan`
    reserved_gb: float | None  # None where it went out of memory


PUBLISHED = [
    Published("7B, bf16-mixed, 1", f"model=llama2_7b {LITGPT} optim=mp_lora mp.frozen_weights=fp32", None),
    Published("7B, bf16-true, 1", f"model=llama2_7b {BF16_TRUE}", 21.30),
    Published("7B, bf16-true, 2", f"model=llama2_7b {BF16_TRUE} training.batch_size=2", 29.07),
    Published("7B, bf16-true, 4", f"model=llama2_7b {BF16_TRUE} training.batch_size=4", None),
    Published("13B, bf16-true, 1", f"model=llama2_13b {BF16_TRUE}", 38.12),
    Published("13B, bf16-true, 2", f"model=llama2_13b {BF16_TRUE} training.batch_size=2", None),
    Published("13B, bf16-true, 4", f"model=llama2_13b {BF16_TRUE} training.batch_size=4", None),
]
