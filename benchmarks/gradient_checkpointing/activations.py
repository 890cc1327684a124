"""Peak memory of an optimizer step with gradient checkpointing at every n-th block, for a model of any size.

The real model, techniques, optimizer and step run on PyTorch's fake tensors, which have shapes and no data; the tracker
that measures real runs counts their bytes. Usage, from the repository's root:

    python benchmarks/gradient_checkpointing/activations.py llama2_7b 32 404 mp_lora 0,1,2,4,6,8,16,32

The arguments: model, its number of layers, tokens of the sample, combination, values of gc.every (0 is off).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from llama_ft import techniques
from llama_ft.config import DataConfig, Dtype, ModelConfig, OptimConfig, TrainConfig
from llama_ft.data.collate import Batch
from llama_ft.launch.run import make_precision
from llama_ft.measure.memory import MemoryTracker
from llama_ft.model.transformer import Transformer
from llama_ft.training.optimizer import make_optimizer
from llama_ft.training.step import TrainStep

CONF = Path(__file__).resolve().parents[2] / "conf"


def step_memory(model_name: str, n_layers: int, n_tokens: int, combination: str, every: int) -> dict[str, Any]:
    """What the tracker sees in two optimizer steps on one sample, of whose tokens half are trained on."""
    sizes = yaml.safe_load((CONF / "model" / f"{model_name}.yaml").read_text()) | {"n_layers": n_layers}
    optim = OptimConfig(**{name: name in combination.split("_") for name in ("ga", "mp", "lora")}, gc=every > 0)
    model, data = ModelConfig(**sizes), DataConfig("sample")
    config = TrainConfig(model=model, optim=optim, data=data, checkpoint="random", tokenizer="none")
    config.gc.every, config.mp.dtype = max(1, every), Dtype.bf16
    precision = make_precision(config, torch.device("cpu"))
    with FakeTensorMode():
        torch.set_default_dtype(techniques.base_dtype(config, precision))  # fake weights cannot be converted in place
        model = Transformer(config.model)
        torch.set_default_dtype(torch.float32)
        applied = techniques.apply(model, config, precision)
        step = TrainStep(model, make_optimizer(model.parameters(), config.training), applied, 1.0)
        positions = torch.zeros(n_tokens // 2, dtype=torch.int64)
        batch = Batch(torch.zeros(1, n_tokens, dtype=torch.int64), positions, positions.clone(), n_tokens + 1)
        model.train()
        with MemoryTracker(model, step.optimizer, batch.tensors) as tracker:
            step([batch])
            step([batch])  # with the optimizer's state allocated
    use = tracker.result()
    return {"every": every, "peak_mib": use.peak_mib, "activation_mib": use.max_mib["activation"], "phase": use.phase}


def main() -> None:
    """A line of JSON for each value of gc.every."""
    model_name, n_layers, n_tokens, combination, values = sys.argv[1:]
    for every in values.split(","):
        row = step_memory(model_name, int(n_layers), int(n_tokens), combination, int(every))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
