"""Peak memory of an optimizer step with gradient checkpointing at every n-th block, for a model of any size.

The planner's step runs on PyTorch's fake tensors, which have shapes but no data; the tracker that measures real runs
counts their bytes. Usage, from the repository's root:

    python benchmarks/gradient_checkpointing/activations.py llama2_7b 32 404 mp_lora 0,1,2,4,6,8,16,32

The arguments: model, its number of layers, tokens of the sample, combination, values of gc.every (0 is off).
"""

import json
import sys

from llama_ft.cli import composed_config
from llama_ft.config import PlanConfig
from llama_ft.measure.memory import MemoryTracker
from llama_ft.planning.fake_run import fake_step, micro_batch
from llama_ft.planning.gpu_traits import Traits


def step_memory(model: str, n_layers: int, n_tokens: int, combination: str, every: int) -> dict[str, int | float | str]:
    """The tracked memory of two optimizer steps on one sample, half of whose tokens are trained on."""
    gc = {"optim.gc": every > 0, "gc.every": max(1, every)}
    keys = {"model": model, "model.n_layers": n_layers, "optim": combination, "mp.dtype": "bf16"} | gc
    config = composed_config("plan", [f"{key}={value}" for key, value in keys.items()], PlanConfig)
    with fake_step(config, Traits(on_cuda=False, has_bf16=True)) as step:
        batch = micro_batch(n_tokens, n_tokens // 2, 1)
        with MemoryTracker(step.model, step.optimizer, batch.tensors) as tracker:
            step([batch])
            step([batch])  # with the optimizer's state allocated
    use = tracker.result()
    return {"every": every, "peak_mib": use.peak_mib, "activation_mib": use.max_mib["activation"], "phase": use.phase}


def main() -> None:
    """Print a line of JSON for each value of gc.every."""
    model, n_layers, n_tokens, combination, values = sys.argv[1:]
    for every in values.split(","):
        row = step_memory(model, int(n_layers), int(n_tokens), combination, int(every))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
