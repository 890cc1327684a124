"""The host's memory of a planned card: tensors copied there count here, not on the card."""

import torch
from torch import Tensor

from llama_ft.techniques.offload import Copy


class FakeHost:
    """Replaces `offload.pinned_copy` and counts the copies' bytes."""

    def __init__(self) -> None:
        self.taken = self.most = 0  # bytes

    def __call__(self, x: Tensor) -> "FakeCopy | None":
        """Copy a fake tensor that represents one on the card."""
        return FakeCopy(self, x) if x.numel() else None  # before PyTorch 2.13 a checkpoint saves an empty tensor too


class FakeCopy(Copy):
    """A copy without data, counted as a block of pinned memory, whose size is a power of 2."""

    def __init__(self, host: FakeHost, x: Tensor) -> None:
        self._host, self._shape, self._dtype, self._nbytes = host, x.shape, x.dtype, 1 << (x.nbytes - 1).bit_length()
        host.taken += self._nbytes
        host.most = max(host.most, host.taken)

    def __del__(self) -> None:
        self._host.taken -= self._nbytes

    def wait(self) -> None:
        """Return at once: nothing is being copied."""

    def fetch(self) -> Tensor:
        """A new fake tensor, which counts on the card."""
        return torch.empty(self._shape, dtype=self._dtype)
