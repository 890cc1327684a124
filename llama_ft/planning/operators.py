"""What operators compute and move: FLOPs by dtype, and bytes, from the shapes of fake tensors.

FLOPs are those of matrix products and attention, as `torch.utils.flop_counter` counts them: 2 a multiply-add; but of
causal attention's square of scores only half and the diagonal, where the kernel passes over the rest. Bytes are those
of each operator's inputs and outputs, once, as a kernel reads and writes that keeps nothing from the one before.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
# (matrix dtype or empty, FLOPs, bytes): how often. Equal operators are one entry; one that works on each tensor of a
# list is as many.
Operators = Counter[tuple[str, float, float]]
EMPTY = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)  # touch nothing
GATHERING = (aten.embedding, aten.index, aten.index_select)  # read of their input what they write, no more


def _attention(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, **__: Any) -> float:
    return float(sdpa_flop_count(q.shape, k.shape, v.shape)) * _computed(q, k, is_causal)


def _attention_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, dropout_p: float, is_causal: bool, **__: Any
) -> float:
    return float(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)) * _computed(q, k, is_causal)


def _computed(q: Tensor, k: Tensor, is_causal: bool) -> float:
    """The share of the square of scores that is on or below the diagonal: what lies above it no kernel has to find."""
    n_q, n_k = q.shape[-2], k.shape[-2]
    return (n_q + 1) / (2 * n_k) if is_causal else 1.0


ATTENTION: dict[Any, Callable[..., float]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run inside `with OperatorCounter() as counter:`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Operators = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default or func.is_view:
            return out
        packet = func._overloadpacket
        if packet not in EMPTY:
            self._count(func, args, kwargs or {}, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        packet = func._overloadpacket
        formula = ATTENTION.get(packet)
        if formula is not None:
            flops = float(formula(*args, **kwargs))
        elif packet in flop_registry:
            flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
        else:
            flops = 0.0
        outputs = list(_tensors(out)) or list(_tensors(_written(func, args)))
        inputs = [] if packet in GATHERING else list(_tensors((args, kwargs)))
        held = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = any(tensor.untyped_storage()._cdata in held for tensor in outputs)
        if is_view and not flops and not str(packet).endswith("_"):  # by another name, such as _unsafe_view
            return
        moved = sum({id(t): t.nbytes for t in inputs}.values()) + sum(t.nbytes for t in outputs)
        if packet in GATHERING:
            moved *= 2
        dtype = str(outputs[0].dtype).removeprefix("torch.") if flops and outputs else ""
        works_on_each = bool(args) and isinstance(args[0], list) and not isinstance(out, Tensor)  # unlike cat and stack
        n = len(args[0]) if works_on_each else 1
        self.operators[dtype, flops / n, moved / n] += n


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _written(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """The arguments that an operator which returns nothing writes to.

    AdamW's gradients are marked so too, as it can unscale them; our step does that before.
    """
    written = zip(func._schema.arguments, args, strict=False)
    return [value for each, value in written if each.alias_info and each.alias_info.is_write and each.name != "grads"]


def scale(operators: Operators, factor: float) -> Operators:
    """The same operators, so many times as often; a fraction where it is an average."""
    scaled: Operators = Counter()
    for key, count in operators.items():
        scaled[key] = count * factor  # type: ignore[assignment]
    return scaled


def total(parts: Iterable[Operators]) -> Operators:
    """All operators of all parts. Negative counts, of a difference, stay."""
    summed: Operators = Counter()
    for part in parts:
        for key, count in part.items():
            summed[key] += count
    return summed


def subtract(operators: Operators, others: Operators) -> Operators:
    """What is left without the others; what they have more of has a negative count."""
    return total([operators, scale(others, -1)])


def flops_of(operators: Operators) -> dict[str, float]:
    """FLOPs by dtype."""
    flops: dict[str, float] = {}
    for (dtype, n_flops, _), count in operators.items():
        if n_flops:
            flops[dtype] = flops.get(dtype, 0.0) + n_flops * count
    return flops


def bytes_of(operators: Operators) -> float:
    """Bytes moved."""
    return sum(n_bytes * count for (_, _, n_bytes), count in operators.items())
