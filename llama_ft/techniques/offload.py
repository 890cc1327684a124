"""Inputs of checkpointed groups in the host's memory between the forward and the backward pass (`gc.offload=cpu`).

What torchtune's `OffloadActivations` does, and TRL's after it, for inputs alone and one at a time: without
`record_stream`, which lets go of memory when the host happens to look, so that each step takes the same.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Copy:
    """A tensor's copy in the host's memory. Copying is on a stream of its own, after what the device computes before;
    the host never waits.

    Pinned memory takes long to allocate. PyTorch keeps it, in blocks of powers of 2, and uses a block again once no
    copy that was begun from or to it is under way (aten/src/ATen/core/CachingHostAllocator.h).
    """

    def __init__(self, x: Tensor) -> None:
        self._device = x.device
        self._there = torch.empty_like(x, device="cpu", pin_memory=True)
        self._copy(x, self._there)

    def fetch(self) -> Tensor:
        """Begin to copy it back, into a new tensor on the device; whoever reads that calls `wait` before.

        The memory is that of the stream which computes, and freed there like any other.
        """
        x = torch.empty_like(self._there, device=self._device)
        self._copy(self._there, x)
        return x

    def wait(self) -> None:
        """Let what the device is told to compute from now on wait for the copying that was begun last."""
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
    """A copy of what is on a GPU; None of what is in the host's memory as it is."""
    return Copy(x) if x.is_cuda else None


class Kept:
    """The input of a group, in the host's memory and, while it is needed or under way, on the device."""

    def __init__(self, x: Tensor, copy: Copy, before: "Kept | None") -> None:
        self.here: Tensor | None = x
        self.copy, self.before = copy, before  # that of the group before, whose turn is next in the backward pass


def offloading(copy_of: Callable[[Tensor], Copy | None]) -> saved_tensors_hooks:
    """A context for each checkpointed group of one forward pass, so that its input is kept as `copy_of` makes it.

    In the forward pass an input leaves the device when the next group begins, and the compute stream waits for its
    copy; in the backward pass the input of the group before comes back while a group is computed.
    """
    last: Kept | None = None

    def pack(x: Tensor) -> Kept | Tensor:
        nonlocal last
        if (copy := copy_of(x)) is None:
            return x
        if last is not None:
            last.copy.wait()  # else its memory could be written to while it is read
            last.here = None
        last = Kept(x.detach(), copy, last if x.requires_grad else None)  # else the pass does not reach those before
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
