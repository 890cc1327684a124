"""What the planner's tests share: a small model, its data and cards."""

from typing import Any

from llama_ft.config import DataConfig, DeviceChoice, GpuConfig, ModelConfig, OptimConfig, TrainConfig
from llama_ft.config.techniques import combinations
from llama_ft.data.dataset import Sample
from llama_ft.planning.gpu_traits import Traits

ON_CPU = Traits(on_cuda=False, has_bf16=True, has_flash=True)
ON_CUDA = Traits(on_cuda=True, has_bf16=True, has_flash=True)
CPU_PROFILE = GpuConfig(name="cpu", device=DeviceChoice.cpu)
SIXTEEN = list(combinations(["gc"]))
# Tokens of samples, and those of their prompts: numbers of targets differ by far more than lengths.
RAGGED = ((30, 5), (12, 2), (25, 23), (8, 3), (17, 10), (40, 4), (9, 7), (21, 19))


def small_config(**on: bool) -> TrainConfig:
    """Two narrow layers, with these techniques."""
    model = ModelConfig("small", 64, 2, 4, 4, 96, vocab_size=2048, max_seq_len=1024)
    return TrainConfig(model, "random", "no.model", OptimConfig(**on), data=DataConfig("sample"))


def ragged_samples() -> list[Sample]:
    """Samples of these lengths."""
    return [Sample([1] * n_tokens, n_prompt) for n_tokens, n_prompt in RAGGED]


def card(name: str = "card", memory_mib: int | None = 1000, capability: str = "8.0", **others: Any) -> GpuConfig:
    """A card's profile."""
    return GpuConfig(name, DeviceChoice.cuda, memory_mib, compute_capability=capability, **others)


def combination_of(optim: OptimConfig) -> str:
    """Names a test's case."""
    return optim.combination
