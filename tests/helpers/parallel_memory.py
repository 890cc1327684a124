"""Runs of a small model over two processes: what the tracker of each shows. Started by `torch.distributed.run`."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llama_ft.config import (
    DataConfig,
    DeviceChoice,
    Dtype,
    GpuConfig,
    LoraConfig,
    MixedPrecisionConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Strategy,
    TrainConfig,
    TrainingConfig,
)
from llama_ft.data.records import Sample
from llama_ft.measure.memory import MemoryTracker
from llama_ft.measure.worst_case import hardest_windows, measure_worst_case
from llama_ft.model.sharded import is_split, own
from llama_ft.parallel.ranks import Ranks
from llama_ft.planning.lengths import blank_samples
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.loop import Windows
from llama_ft.training.setup import set_up
from llama_ft.training.step import TrainStep

N = 2
CPU = torch.device("cpu")
# 301 tokens, and a width of 33: the second process has fewer rows of some weights.
MODEL = ModelConfig("small", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=97, vocab_size=301, max_seq_len=128)
LENGTHS = [(30 + n % 7, 20 - n % 5) for n in range(13)]  # tokens, and those of the prompt


@dataclass(frozen=True)
class Case:
    """A run."""

    strategy: str
    techniques: str = ""
    frozen_weights: str = "compute"
    micro_batch_size: int = 1
    packing: int | None = None

    @property
    def config(self) -> TrainConfig:
        """The run's."""
        return TrainConfig(
            MODEL,
            data=DataConfig("sample"),
            checkpoint="random",
            tokenizer="none",
            optim=OptimConfig(**dict.fromkeys(self.techniques.split(), True)),
            training=TrainingConfig(micro_batch_size=self.micro_batch_size, packing=self.packing),
            mp=MixedPrecisionConfig(frozen_weights=Dtype[self.frozen_weights]),
            lora=LoraConfig(rank=5, dropout=0.0),
            parallel=ParallelConfig(Strategy[self.strategy], processes=N),
            gpu=GpuConfig("cpu", device=DeviceChoice.cpu),
        )


def samples() -> list[Sample]:
    """As long as `LENGTHS` say."""
    return blank_samples(LENGTHS)


def real_step(case: Case) -> tuple[TrainStep, Windows]:
    """The step of this process, and its data."""
    config = case.config
    ranks = Ranks(config.parallel.strategy, torch.distributed.get_rank(), N)
    step = set_up(config, Precision.of(config, "cpu", True), CPU, ranks=ranks)
    step.model.train()
    training = TrainingConfig(micro_batch_size=case.micro_batch_size, packing=case.packing)
    return step, Windows.over(samples(), step, training, config.accumulation_steps)


def held_at_update(case: Case) -> dict[str, tuple[int, int]]:
    """Bytes when an update begins: by category, those of the tensors themselves and those of the tracker."""
    step, data = real_step(case)
    window = hardest_windows(data)[0]
    step.dry_run(window)
    with MemoryTracker(step.model, step.optimizer) as tracker:
        found: dict[str, tuple[int, int]] = {}

        def compare(*_: object) -> None:
            parameters = list(step.model.parameters())
            states = [tensor for state in step.optimizer.state.values() for tensor in state.values()]
            for name, tensors in {
                "parameter": parameters,
                "gradient": [each.grad for each in parameters if each.grad is not None],
                "optimizer_state": states,
            }.items():
                storages = {own(each.detach()).untyped_storage()._cdata: each for each in tensors}
                n_bytes = sum(own(each.detach()).untyped_storage().nbytes() for each in storages.values())
                tracked = sum(sign * a.nbytes for a, sign, _ in tracker.events if a.category == name)
                found[name] = n_bytes, tracked

        step.optimizer.register_step_pre_hook(compare)
        step(window)
    assert any(map(is_split, step.model.parameters())) == (case.strategy == "fsdp")
    return found


def main() -> None:
    """Run the cases of a file, and write what this process found beside it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    file = Path(sys.argv[1])
    cases = [Case(**each) for each in json.loads(file.read_text())]
    uses = [asdict(measure_worst_case(*real_step(case))) for case in cases]
    held = [held_at_update(case) for case in cases]
    file.with_suffix(f".{torch.distributed.get_rank()}").write_text(json.dumps([uses, held]))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
