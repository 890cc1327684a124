"""Run by `torch.distributed.run`: the gradients, losses and weights of split steps, of many cases in one process.

python -m torch.distributed.run --nproc-per-node 2 -m helpers.split_steps CASES.json OUT.pt
"""

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_ft.config import (
    DataConfig,
    Dtype,
    LoraConfig,
    MixedPrecisionConfig,
    ModelConfig,
    OptimConfig,
    Optimizer,
    ParallelConfig,
    Strategy,
    TrainConfig,
    TrainingConfig,
)
from llama_ft.data.records import Sample
from llama_ft.model.sharded import own, whole, write_rows
from llama_ft.model.storage import Storage
from llama_ft.parallel.ranks import ALONE, Ranks
from llama_ft.techniques.lora import lora_layers
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.loop import Windows
from llama_ft.training.setup import set_up
from llama_ft.training.step import evaluate

Case = dict[str, Any]


def config_of(case: Case) -> TrainConfig:
    """A small model, with grouped queries, of rows that 4 processes do not share evenly."""
    model = ModelConfig("small", 60, 2, 6, 2, 90, vocab_size=301, max_seq_len=128, **case.get("model", {}))
    dtype = Dtype[case["compute"]] if "compute" in case else Dtype.auto
    mp = MixedPrecisionConfig(dtype, Dtype[case.get("frozen", "compute")])
    training = TrainingConfig(
        lr=1e-2,
        micro_batch_size=case.get("size", 2),
        packing=case.get("packing"),
        optimizer=Optimizer[case.get("optimizer", "adamw")],
    )
    return TrainConfig(
        model,
        data=DataConfig("sample"),
        checkpoint="random",
        tokenizer="none",
        optim=OptimConfig(**dict.fromkeys(case["optim"], True)),
        training=training,
        mp=mp,
        lora=LoraConfig(dropout=0.0),
        parallel=ParallelConfig(Strategy[case["strategy"]], int(os.environ.get("WORLD_SIZE", 1))),
    )


def ragged(n: int = 19) -> list[Sample]:
    """The last window of an epoch is shorter than the others."""
    draw = random.Random(0)
    return [Sample.after([draw.randrange(5, 300) for _ in range(draw.randrange(3, 40))], 2) for _ in range(n)]


def outcome(case: Case) -> dict[str, Any]:
    """An epoch's losses, gradient norms, the first window's gradients, the weights, and the held-out loss."""
    config = config_of(case)
    split = config.parallel
    ranks = Ranks(split.strategy, int(os.environ["RANK"]), split.world_size) if split.is_split else ALONE
    torch.manual_seed(0)
    precision = Precision.of(config, "cpu", True)
    if case.get("fp64"):
        precision = Precision("cpu", trainable=torch.float64, frozen=Storage(torch.float64))
    step = set_up(config, precision, torch.device("cpu"), ranks=ranks)
    samples = ragged()
    data = Windows.over(samples, step, config.training, config.accumulation_steps)
    held_out = Windows.over(samples, step, replace(config.training, micro_batch_size=3), held_out=samples[:7])
    for layer in lora_layers(step.model).values():  # of zeros nothing would reach lora_A
        write_rows(layer.lora_B.detach(), 0, torch.randn(layer.lora_B.shape) / 10)
    held = sum(own(parameter).nbytes for parameter in step.model.parameters())
    names = {parameter: name for name, parameter in step.model.named_parameters()}
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}, "bytes": held}
    clip = step.update._clip

    def keeping() -> torch.Tensor:
        for each in step.optimizer.param_groups[0]["params"]:
            if not found["losses"] and each.grad is not None:
                found["gradients"][names[each]] = whole(each.grad).clone()
        return clip()

    step.update._clip = keeping  # type: ignore[method-assign]
    for window in data.epoch(0):
        loss, norm = step(window)
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
    found["weights"] = {name: whole(each.detach()).clone() for name, each in step.model.named_parameters()}
    found["held_out"] = evaluate(step, held_out.held_out_share())
    return found


def main() -> None:
    """All cases, in order; the first process writes what it found."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    found = [outcome(case) for case in json.loads(Path(sys.argv[1]).read_text())]
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
