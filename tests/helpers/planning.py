"""What the planner's tests share: a small model, its data and cards."""

from typing import Any

from llama_ft.config import DataConfig, DeviceChoice, GpuConfig, ModelConfig, OptimConfig, TrainConfig
from llama_ft.planning.gpu_traits import Traits

ON_CPU = Traits(on_cuda=False, has_bf16=True)
ON_CUDA = Traits(on_cuda=True, has_bf16=True)
CPU_PROFILE = GpuConfig(name="cpu", device=DeviceChoice.cpu)

# A wide head over few layers: a fake run is quick, and a token needs enough for the allocator's pages to differ.
WIDE_HEAD = ModelConfig("wide", 32, 1, 2, 2, 48, vocab_size=200_000, max_seq_len=24)
SHORT = ((12, 4), (20, 6), (9, 2), (16, 3), (14, 9))


def small_config(**on: bool) -> TrainConfig:
    """Two narrow layers, with these techniques."""
    model = ModelConfig("small", 64, 2, 4, 4, 96, vocab_size=2048, max_seq_len=1024)
    return TrainConfig(model, "random", "no.model", OptimConfig(**on), data=DataConfig("sample"))


def card(name: str = "card", memory_mib: int | None = 1000, capability: str = "8.0", **others: Any) -> GpuConfig:
    """A card's profile."""
    return GpuConfig(name, DeviceChoice.cuda, memory_mib, compute_capability=capability, **others)
