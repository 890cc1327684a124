"""Keeps inputs of checkpointed groups in the host's memory between forward and backward pass (`gc.offload=cpu`).

Like torchtune's `OffloadActivations`, and TRL's after it, but only for inputs, one at a time, and without
`record_stream`: that frees memory only when the host happens to check, so steps would differ in memory use.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Copy:
    """A tensor's copy in the host's memory.

    Copying uses its own stream and follows all work submitted to the device before; the host never waits. Pinned memory
    is slow to allocate: PyTorch keeps it, in blocks of powers of 2, and reuses a block once no copy from or to it is
    pending (aten/src/ATen/core/CachingHostAllocator.h).
    """

    def __init__(self, x: Tensor) -> None:
        self._device = x.device
        self._there = torch.empty_like(x, device="cpu", pin_memory=True)
        self._copy(x, self._there)

    def fetch(self) -> Tensor:
        """Begin to copy it back into a new tensor on the device; call `wait` before reading the tensor.

        Its memory belongs to the compute stream and is freed there as usual.
        """
        x = torch.empty_like(self._there, device=self._device)
        self._copy(self._there, x)
        return x

    def wait(self) -> None:
        """Make all work submitted to the device from now on wait for the last copy."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def _copy(self, source: Tensor, to: Tensor) -> None:
        stream = _copying_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        self._done = stream.record_event()


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def pinned_copy(x: Tensor) -> Copy | None:
    """A copy of a tensor on a GPU; None if it is in the host's memory already."""
    return Copy(x) if x.is_cuda else None


class Kept:
    """A group's input, in the host's memory and, while needed or being copied, on the device."""

    def __init__(self, x: Tensor, copy: Copy, before: "Kept | None") -> None:
        self.here: Tensor | None = x
        self.copy, self.before = copy, before  # `before` is the previous group's input, next in the backward pass


def offloading(copy_of: Callable[[Tensor], Copy | None]) -> saved_tensors_hooks:
    """A context for the checkpointed groups of one forward pass that keeps each group's input as `copy_of` makes it.

    In the forward pass an input leaves the device when the next group begins, after the compute stream has waited for
    its copy. In the backward pass the previous group's input is copied back while a group is computed.
    """
    last: Kept | None = None

    def pack(x: Tensor) -> Kept | Tensor:
        nonlocal last
        if (copy := copy_of(x)) is None:
            return x
        if last is not None:
            last.copy.wait()  # else its memory could be overwritten while it is copied
            last.here = None
        last = Kept(x.detach(), copy, last if x.requires_grad else None)  # else backward stops here
        return last

    def unpack(kept: Kept | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x = kept.copy.fetch() if kept.here is None else kept.here
        kept.copy.wait()
        before, kept.here, kept.before = kept.before, None, None
        if before is not None:
            before.here = before.copy.fetch()
        return x

    return saved_tensors_hooks(pack, unpack)
