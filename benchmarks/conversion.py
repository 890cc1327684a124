"""Measures the memory and time of converting a checkpoint of 2 GiB: `python -m benchmarks.conversion DIR`.

The model is four layers of LLaMA-2-7B between its embeddings, with random weights in fp16. Each conversion is its own
process; its peak resident memory, including pages of mapped files, is read from the system at its end.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ft import cli
from llama_ft.config import ConvertConfig, ModelConfig
from llama_ft.files import write_text
from llama_ft.model.export import write_hf
from llama_ft.model.sizes import hf_config
from llama_ft.model.stored import Weight
from llama_ft.model.transformer import Transformer
from llama_ft.system import MIB
from llama_ft.techniques.lora import add_lora, lora_layers
from llama_ft.training.saver import save_trained

SIZES = ("model=llama2_7b", "model.n_layers=4")
# Arguments of `convert`; each step reads the output of an earlier one.
STEPS = {
    "Hugging Face to Meta, 1 file": "checkpoint=hf to=meta output=meta",
    "Hugging Face to Meta, 4 files": "checkpoint=hf to=meta output=meta4 shards=4",
    "Meta, 1 file, to Hugging Face": "checkpoint=meta to=hf output=from_meta shards=1",
    "Meta, 4 files, to Hugging Face": "checkpoint=meta4 to=hf output=from_meta4 shards=3",
    "merging LoRA of all linear layers, to bf16": "checkpoint=hf adapter=adapter to=hf output=merged dtype=bf16",
}
GIB = 2**30


def random_weight(shape: list[int], seed: int) -> Weight:
    """Normally distributed numbers, drawn a piece at a time."""

    def pieces(multiple: int) -> Iterator[tuple[int, Tensor]]:
        generator, step = torch.Generator().manual_seed(seed), max(1, 2**20 // math.prod(shape[1:]))
        step = -(-step // multiple) * multiple
        for first in range(0, shape[0], step):
            rows = torch.empty(min(step, shape[0] - first), *shape[1:]).normal_(0, 0.02, generator=generator)
            yield first, rows.half()

    return Weight(shape, torch.float16, pieces)


def make(folder: Path, config: ModelConfig) -> tuple[int, int]:
    """Write a Hugging Face checkpoint and an adapter; return the bytes of all tensors, and of the largest."""
    with torch.device("meta"):
        shapes = {name: list(parameter.shape) for name, parameter in Transformer(config).named_parameters()}
        model = Transformer(config)
    weights = {name: random_weight(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    (folder / "hf").mkdir(parents=True)
    write_hf(weights, config, hf_config(config, "float16", 1, 2), folder / "hf", 2, lambda n_bytes: None)
    add_lora(model, 16, 32.0, 0.0, ["wq", "wk", "wv", "wo", "w1", "w2", "w3"])
    for layer in lora_layers(model).values():
        layer.lora_A = torch.nn.Parameter(torch.randn(layer.lora_A.shape) * 0.02)
        layer.lora_B = torch.nn.Parameter(torch.randn(layer.lora_B.shape) * 0.02)
    (folder / "adapter").mkdir()
    save_trained(model, folder / "adapter")
    sizes = [weight.n_bytes for weight in weights.values()]
    return sum(sizes), max(sizes)


def measured(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run a conversion; return its seconds and peak resident memory."""
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "llama_ft.convert", *arguments], cwd=folder)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"convert {' '.join(arguments)} failed")
    return {"seconds": time.monotonic() - began, "peak_rss_mib": usage.ru_maxrss * 1024 / MIB}


def main() -> None:
    """Make, convert, measure."""
    folder = Path(sys.argv[1])
    config = cli.composed_config("convert", [*SIZES, "checkpoint=hf", "to=hf", "output=x"], ConvertConfig).model
    total, largest = make(folder, config)
    bound = (largest + GIB) / MIB
    print(f"{total / GIB:.2f} GiB, largest tensor {largest / MIB:,.0f} MiB: at most {bound:,.0f} MiB are allowed")
    rows = {name: measured(arguments.split(), folder) for name, arguments in STEPS.items()}
    result = {
        "checkpoint_mib": total / MIB,
        "largest_tensor_mib": largest / MIB,
        "bound_mib": bound,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "command": cli.command_line(),
        "conversions": rows,
    }
    write_text(folder / "conversion.json", json.dumps(result, indent=2) + "\n")
    for name, row in rows.items():
        print(f"{name:<45} {row['seconds']:6.1f} s {row['peak_rss_mib']:8,.0f} MiB")
    print(f"Written: {folder / 'conversion.json'}")


if __name__ == "__main__":
    main()
