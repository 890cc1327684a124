"""Records what else a run's numbers depend on: the GPU's software, kernels, other users, clocks and power."""

import os
from contextlib import suppress
from typing import Any

import torch

from llama_ft.config import ModelConfig
from llama_ft.model.attention import repeats_keys
from llama_ft.records.result import CardFacts
from llama_ft.system import MIB


class Nvml:
    """NVIDIA's management library for one GPU. Its answers are None if the library or its driver is missing."""

    def __init__(self, device: torch.device) -> None:
        self._library: Any = None
        if device.type != "cuda":
            return
        uuid = torch.cuda.get_device_properties(device).uuid
        with suppress(Exception):
            import pynvml  # type: ignore[import-untyped]

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._library = pynvml

    def ask(self, name: str, *arguments: object, **options: object) -> Any:
        """The result of the library's function `nvmlDeviceNAME` for the GPU; None if unavailable."""
        if self._library is None:
            return None
        with suppress(self._library.NVMLError):
            return getattr(self._library, f"nvmlDevice{name}")(self._handle, *arguments, **options)
        return None

    def joules(self) -> float | None:
        """Energy used by the GPU since its driver was loaded (compute capability 7.0 and later)."""
        millijoules = self.ask("GetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def sm_clock_mhz(self, highest: bool = False) -> int | None:
        """The multiprocessors' current clock, or their highest."""
        mhz: int | None = self.ask("GetMaxClockInfo" if highest else "GetClockInfo", 1)  # NVML_CLOCK_SM
        return mhz

    def used_mib(self) -> float | None:
        """Memory in use on the GPU by all processes, without the driver's own."""
        memory = self.ask("GetMemoryInfo", version=self._library and self._library.nvmlMemory_v2)
        return None if memory is None else memory.used / MIB

    def driver(self) -> str | None:
        """The driver's version."""
        return self._library and str(self._library.nvmlSystemGetDriverVersion())


class Card:
    """The GPU of a run. Create it before this process has a context there: all memory in use then belongs to others."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.nvml = device, Nvml(device)
        self._others_mib = self.nvml.used_mib()
        self.facts = CardFacts(
            index=device.index,
            driver=self.nvml.driver(),
            cudnn=torch.backends.cudnn.version(),
            allocator=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
            others_mib=self._others_mib,
            max_sm_clock_mhz=self.nvml.sm_clock_mhz(highest=True),
        )
        self._context_mib = self._outside_mib()

    def note_kernels(self, model: ModelConfig, dtype: torch.dtype) -> None:
        """Record the kernels, once they have been chosen."""
        self.facts.attention_kernel = attention_kernel(model, dtype, self._device)
        self.facts.matmul_precision = torch.get_float32_matmul_precision()

    def note_end(self, mean_power_w: float | None) -> None:
        """Record what is known after the run has been measured."""
        facts, statistics = self.facts, torch.cuda.memory_stats(self._device)
        outside_mib = self._outside_mib()
        facts.context_growth_mib = outside_mib - self._context_mib
        facts.context_mib = None if self._others_mib is None else outside_mib - self._others_mib
        facts.n_alloc_retries, facts.n_ooms = statistics.get("num_alloc_retries", 0), statistics.get("num_ooms", 0)
        facts.sm_clock_mhz, facts.mean_power_w = self.nvml.sm_clock_mhz(), mean_power_w

    def _outside_mib(self) -> float:
        """Memory in use outside PyTorch's allocator: contexts, libraries, other processes."""
        free, total = torch.cuda.mem_get_info(self._device)
        return (total - free - torch.cuda.memory_reserved(self._device)) / MIB


def attention_kernel(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that PyTorch chooses for a training step's attention: flash, efficient, cudnn or math."""
    q = torch.empty(1, model.n_heads, 64, model.head_dim, dtype=dtype, device=device)
    kv = q[:, : model.n_kv_heads] if not repeats_keys(q, None) else q
    choice = torch._fused_sdp_choice(q, kv, kv, is_causal=True, enable_gqa=kv.shape[1] != q.shape[1])
    return ("math", "flash", "efficient", "cudnn")[choice]
