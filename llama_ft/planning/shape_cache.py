"""Doubles the speed of fake tensors by caching what each operator returns for given shapes.

`FakeTensorMode` has a cache too, but spends most of its time on keys that support symbolic shapes, sparse and quantized
tensors and more. A training step has dense tensors of fixed shapes, and runs some hundred different operators thousands
of times.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

Key = tuple[Any, ...]
# For each output: the index of the input that it is, or shares its storage with, or None; then shape, stride, dtype and
# offset, or None if it is that input.
Recipe = list[tuple[int | None, tuple[Any, ...] | None]]


class ShapeCache(TorchDispatchMode):
    """A cache to enter within a `FakeTensorMode`, which it calls for anything new."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake
        self._recipes: dict[Key, tuple[Any, Recipe] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Return the same as FakeTensorMode."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # a DTensor calls the operator again on this process's rows
        if func.namespace in ("c10d", "fsdp"):
            return func(*args, **(kwargs or {}))
        inputs: list[Tensor] = []
        key = (func, _key(args, inputs), _key(tuple((kwargs or {}).items()), inputs))
        try:
            known = self._recipes.get(key, ())
        except TypeError:  # something is not hashable
            return func(*args, **(kwargs or {}))
        if not known:
            out = func(*args, **(kwargs or {}))
            if known == ():
                changes_inputs = torch.Tag.inplace_view in func.tags  # it changes their shapes each time
                self._recipes[key] = None if changes_inputs else _recipe(out, inputs)
            return out
        kind, recipe = known
        with no_dispatch():
            made = [self._make(inputs, index, sizes) for index, sizes in recipe]
        return made[0] if kind is Tensor else kind(made)

    def _make(self, inputs: Sequence[Tensor], index: int | None, sizes: tuple[Any, ...] | None) -> Tensor:
        if sizes is None:
            return inputs[index or 0]
        shape, stride, dtype, offset = sizes
        if index is None:
            plain = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            plain = torch.empty(0, dtype=dtype, device="meta")
            plain.set_(inputs[index].untyped_storage(), offset, shape, stride)
        return FakeTensor(self._fake, plain, torch.device("cpu"))


def _key(value: Any, inputs: list[Tensor]) -> Any:
    """The part of an argument that decides the outputs' shapes; its tensors are appended to `inputs`."""
    if isinstance(value, Tensor):
        inputs.append(value)
        return tuple(value.shape), value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, list | tuple):
        return tuple([_key(each, inputs) for each in value])
    return type(value), value  # True is not 1 here


def _recipe(out: Any, inputs: Sequence[Tensor]) -> tuple[Any, Recipe] | None:
    """A recipe to recreate outputs; None unless they are plain CPU tensors without lazy conjugation."""
    kind, outputs = (type(out), list(out)) if isinstance(out, list | tuple) else (Tensor, [out])
    if not outputs or not all(isinstance(each, FakeTensor) and each.fake_device.type == "cpu" for each in outputs):
        return None
    if any(each.is_conj() for each in outputs):
        return None
    recipe: Recipe = []
    storages = {tensor.untyped_storage()._cdata: index for index, tensor in reversed(list(enumerate(inputs)))}
    for each in outputs:
        same = next((index for index, tensor in enumerate(inputs) if tensor is each), None)
        sizes = tuple(each.shape), each.stride(), each.dtype, each.storage_offset()
        recipe.append((same, None) if same is not None else (storages.get(each.untyped_storage()._cdata), sizes))
    return kind, recipe
