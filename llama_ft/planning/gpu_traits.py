"""The properties of a card, besides its memory size, that decide how much memory a run uses on it."""

from dataclasses import dataclass, replace

import torch

from llama_ft.config import DeviceChoice, GpuConfig, TrainConfig
from llama_ft.device import gpu_index, why_no_gpu
from llama_ft.model.attention import has_varlen
from llama_ft.planning.allocator import ROUNDING
from llama_ft.techniques.mixed_precision import Precision

# cuBLAS workspaces, from PyTorch's allocator, one for each thread that multiplies: the forward pass's and the backward
# pass's (parseChosenWorkspaceSize in aten/src/ATen/cuda/CublasHandlePool.cpp; pytorch/pytorch#89027). They are larger
# on Hopper, and on Blackwell since PyTorch 2.12 (pytorch/pytorch#175344).
WORKSPACE_BYTES, LARGE_WORKSPACE_BYTES, N_WORKSPACES = 4096 * 2 * 1024 + 16 * 8 * 1024, 32 * 2**20, 2


@dataclass(frozen=True)
class Traits:
    """Cards with equal traits run a combination in the same way."""

    on_cuda: bool
    has_bf16: bool  # supports bf16; on CUDA, also has FlashAttention for its 16-bit format

    @property
    def rounding(self) -> int:
        """The multiple, in bytes, to which storages are rounded up."""
        return ROUNDING if self.on_cuda else 1

    def precision(self, config: TrainConfig) -> Precision:
        """The dtypes of a run on the card; a UserError if the card lacks the configured 16-bit format."""
        return Precision.of(config, "cuda" if self.on_cuda else "cpu", self.has_bf16)

    def repeats_keys(self, is_16bit: bool) -> bool:
        """As `attention.repeats_keys`, on the card."""
        return self.on_cuda and not (self.has_bf16 and is_16bit)

    def takes_segments(self, is_16bit: bool, head_dim: int) -> bool:
        """As `attention.takes_segments`, on the card."""
        return self.on_cuda and self.has_bf16 and is_16bit and has_varlen(head_dim)


def traits_of(gpu: GpuConfig) -> Traits:
    """The traits of a profile's card, or of the CPU if it is not a card's."""
    if gpu.device is not DeviceChoice.cuda:
        return Traits(on_cuda=False, has_bf16=True)
    return Traits(on_cuda=True, has_bf16=(gpu.capability or (8, 0)) >= (8, 0))


def relevant_traits(traits: Traits, config: TrainConfig) -> Traits:
    """The traits, with a default for those that do not affect this combination and model, so that equal runs match."""
    if config.optim.mp or config.model.n_kv_heads != config.model.n_heads:
        return traits
    return replace(traits, has_bf16=True)


def workspace_bytes(gpu: GpuConfig) -> int:
    """The bytes that cuBLAS takes from the allocator on the card."""
    if gpu.device is not DeviceChoice.cuda:
        return 0
    is_large = gpu.capability is not None and gpu.capability[0] in (9, 10, 12)
    return N_WORKSPACES * (LARGE_WORKSPACE_BYTES if is_large else WORKSPACE_BYTES)


def profile_here(gpu: GpuConfig) -> GpuConfig:
    """A profile of this machine's GPU, without its rates, or of the CPU if there is none.

    Its context includes all memory in use already, by a context and by other processes.
    """
    if why_no_gpu():
        return replace(gpu, name="cpu", device=DeviceChoice.cpu)
    index = gpu_index(gpu)
    properties = torch.cuda.get_device_properties(index)
    card = replace(gpu, device=DeviceChoice.cuda, compute_capability=f"{properties.major}.{properties.minor}")
    free, memory = (n_bytes // 2**20 for n_bytes in torch.cuda.mem_get_info(index))
    return replace(card, name=properties.name, memory_mib=memory, context_mib=memory - free)
