"""The host's memory beside a planned card: what is copied there counts here, and not on the card."""

import torch
from torch import Tensor

from llama_ft.techniques.offload import Copy


class FakeHost:
    """Makes copies in place of `offload.pinned_copy`, and counts them."""

    def __init__(self) -> None:
        self.taken = self.most = 0  # bytes

    def __call__(self, x: Tensor) -> "FakeCopy | None":
        """The copy of a fake tensor that stands for one on the card."""
        return FakeCopy(self, x) if x.numel() else None  # before PyTorch 2.13 a checkpoint saves an empty tensor too


class FakeCopy(Copy):
    """A copy of which there is the shape alone; it takes a block of pinned memory, of a power of 2."""

    def __init__(self, host: FakeHost, x: Tensor) -> None:
        self._host, self._shape, self._dtype, self._nbytes = host, x.shape, x.dtype, 1 << (x.nbytes - 1).bit_length()
        host.taken += self._nbytes
        host.most = max(host.most, host.taken)

    def __del__(self) -> None:
        self._host.taken -= self._nbytes

    def wait(self) -> None:
        """Nothing is under way."""

    def fetch(self) -> Tensor:
        """What is on the card from then on."""
        return torch.empty(self._shape, dtype=self._dtype)
