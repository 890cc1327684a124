"""The work in llama_ft: configuration, set-up and training step."""

from argparse import Namespace
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.peers import workload
from benchmarks.peers.workload import LORA_ALPHA, LORA_DROPOUT, LORA_RANK, SIZES, WINDOW, Meter, Row
from llama_ft.config import DataConfig, GpuConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig, TrainingConfig
from llama_ft.config.checks import DeviceChoice, Dtype
from llama_ft.config.techniques import GradientAccumulationConfig, MixedPrecisionConfig
from llama_ft.data.records import Sample
from llama_ft.device import choose_device, has_bf16, use_device
from llama_ft.model.formats import hf_name, is_rotated, permute_rotary
from llama_ft.model.transformer import Transformer
from llama_ft.techniques.gradient_accumulation import windows
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.loop import Windows
from llama_ft.training.setup import set_up
from llama_ft.training.step import TrainStep

PACKING = 1024  # the most tokens in a pass
OUR_TARGETS = {"wq": "q_proj", "wv": "v_proj"}


def configured(row: Row) -> TrainConfig:
    """The row's config: techniques at their defaults, except for the work's settings."""
    return TrainConfig(
        model=ModelConfig(name="peers", n_kv_heads=SIZES.n_heads, **asdict(SIZES)),
        checkpoint="random",
        tokenizer="none",  # samples are tokens already
        optim=OptimConfig(**{name: row.has(name) for name in ("ga", "mp", "lora")}),
        ga=GradientAccumulationConfig(steps=WINDOW),
        mp=MixedPrecisionConfig(dtype=Dtype.bf16),
        lora=LoraConfig(LORA_RANK, LORA_ALPHA, dropout=LORA_DROPOUT, targets=list(OUR_TARGETS)),
        training=TrainingConfig(lr=workload.ADAMW["lr"]),
        data=DataConfig("sample"),
        gpu=GpuConfig("cpu", DeviceChoice.cpu),
    )


@torch.no_grad()
def load(model: Transformer) -> None:
    """Give the model the work's weights, even if techniques have replaced its modules."""
    theirs, n_heads = workload.weights(), SIZES.n_heads
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            _, layer, _, ours, _ = name.split(".")
            parameter.copy_(workload.lora_a(int(layer), OUR_TARGETS[ours]))
        elif not name.endswith("lora_B"):  # lora_B stays zero
            weight = theirs[hf_name(name)]
            parameter.copy_(permute_rotary(weight, n_heads, to_hf=False) if is_rotated(name) else weight)


def made(row: Row) -> TrainStep:
    """The training step of a run of this row."""
    config = configured(row)
    device = use_device(choose_device(config.gpu), config.gpu)
    step = set_up(config, Precision.of(config, device.type, has_bf16(device, config.gpu)), device)
    load(step.model)
    step.model.train()
    return step


def measured(args: Namespace) -> dict[str, Any]:
    """Train, timed like the others."""
    row, step, meter = args.row, made(args.row), Meter(args.row.window)
    pairs = workload.samples()
    samples = [
        Sample.after(tokens[0].tolist(), tokens.numel() - workload.n_targets(labels)) for tokens, labels in pairs
    ]
    data = Windows.over(samples, step, TrainingConfig(packing=PACKING if row.has("packed") else None), row.window)
    for sample in samples[-workload.N_WARM_UP :]:
        step.dry_run([data.lay_out([sample])])
    meter.start()
    for group in windows(samples[: args.samples], row.window):
        window = data.share(group)  # collated on demand
        loss = step(window)[0].item()
        meter.add(loss, sum(batch.n_targets for batch in window), sum(map(len, group)), len(group))
    return meter.stop()


if __name__ == "__main__":
    args = workload.arguments()
    workload.tell(args, measured(args), ["llama_ft"])
