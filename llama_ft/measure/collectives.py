"""Waits until the tensors that processes exchange can be freed."""

import time
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PATIENCE_S = 0.02


class GlooReferences:
    """References to a collective's tensors that gloo's threads still hold for a moment after the caller has continued.

    Without waiting, measured memory would depend on how long that happens to be. On CUDA there is nothing to wait for:
    NCCL's tensors are protected by the order of the stream, not by references.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[weakref.ref[Tensor], int, int]] = []  # (tensor, its and its storage's reference counts)

    def note(self, args: Any) -> None:
        """Note the arguments of a collective that is about to begin."""
        tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
        alike = Counter(tensor.untyped_storage()._cdata for tensor in tensors)
        self._noted += [
            (weakref.ref(each), _count(each), _holders(each) + 1 - alike[each.untyped_storage()._cdata])
            for each in tensors
        ]

    def wait(self) -> None:
        """Wait until the threads have released the tensors."""
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
