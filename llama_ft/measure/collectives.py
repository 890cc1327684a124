"""When the tensors that processes exchange are free again."""

import time
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PATIENCE_S = 0.02


class GlooReferences:
    """What gloo's threads hold of the last collective's tensors: for a moment still, after the caller has gone on.

    How long is chance, and so would be what is alive then. On CUDA there is nothing to wait for: NCCL's tensors are
    kept by the stream's order, not by references.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[weakref.ref[Tensor], int, int]] = []  # of whom; the most references, of its storage too

    def note(self, args: Any) -> None:
        """A collective with these arguments is about to begin."""
        tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
        alike = Counter(tensor.untyped_storage()._cdata for tensor in tensors)
        self._noted += [
            (weakref.ref(each), _count(each), _holders(each) + 1 - alike[each.untyped_storage()._cdata])
            for each in tensors
        ]

    def wait(self) -> None:
        """Until the threads have let go."""
        end = time.monotonic() + PATIENCE_S
        while self._noted and time.monotonic() < end:
            self._noted = [each for each in self._noted if _is_held(*each)]
            if self._noted:
                time.sleep(1e-4)  # they need the interpreter's lock
        self._noted = []


def _is_held(reference: "weakref.ref[Tensor]", n_calling: int, most: int) -> bool:
    tensor = reference()
    return tensor is not None and (_count(tensor) >= n_calling or _holders(tensor) > most)


def _count(tensor: Any) -> int:
    count: int = tensor._use_count()
    return count


def _holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
