"""Counts operators' FLOPs by dtype, and the bytes that they move, from the shapes of fake tensors.

FLOPs are those of matrix products and attention, counted as in `torch.utils.flop_counter`: 2 per multiply-add. For
causal attention only the scores on and below the diagonal count, since kernels skip the rest. Bytes are each operator's
inputs and outputs, once, as for a kernel that reuses nothing from the one before. Communication is that of a ring: a
process sends, and receives, (N - 1) / N of the tensors of N processes, and twice that for sums.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from llama_ft.config import GpuConfig
from llama_ft.model.sharded import own

K = TypeVar("K")
aten = torch.ops.aten
# (matrix dtype, `LINK` or empty; FLOPs; bytes): count. Equal operators share an entry; an operator that works on each
# tensor of a list counts once for each.
Operators = Counter[tuple[str, float, float]]
EMPTY = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)  # touch nothing
TERA, GIGA = 1e12, 1e9
LINK = "communication"
# By part of a collective's name: the index of the argument that holds the whole tensor, and rounds of the ring.
COLLECTIVES = {"allgather": (0, 1), "reduce_scatter": (1, 1), "allreduce": (0, 2), "all_reduce": (0, 2)}
RATES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # PyTorch multiplies fp32 in fp32, not in TF32
ONLY_READ = ("g", "qmap1", "qmap2")  # by bitsandbytes' updates, whose schemas mark all arguments as written
Share = tuple[int, float]  # FLOPs of all scores, and the share of the scores that kernels compute
GATHERING = (aten.embedding, aten.index, aten.index_select)  # read only as much of their input as they write


def _attention(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, **__: Any) -> Share:
    return sdpa_flop_count(q.shape, k.shape, v.shape), _computed(q, k, is_causal)


def _attention_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, dropout_p: float, is_causal: bool, **__: Any
) -> Share:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape), _computed(q, k, is_causal)


def _computed(q: Tensor, k: Tensor, is_causal: bool) -> float:
    """The share of the scores on or below the diagonal: kernels need not compute those above it."""
    n_q, n_k = q.shape[-2], k.shape[-2]
    return (n_q + 1) / (2 * n_k) if is_causal else 1.0


def _varlen(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, longest: int, *_: Any) -> Share:
    """FLOPs of a packed row whose sequences are all as long as the longest, as in `run_costs`."""
    each = (len(q) // longest, q.shape[1], longest, q.shape[2])
    return sdpa_flop_count(each, each, each), (longest + 1) / (2 * longest)


def _varlen_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Share:
    longest: int = others[4]
    each = (len(q) // longest, q.shape[1], longest, q.shape[2])
    return sdpa_backward_flop_count(each, each, each, each), (longest + 1) / (2 * longest)


# By the operator's name: those for packed rows exist only once they have been imported.
ATTENTION: dict[str, Callable[..., Share]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run inside `with OperatorCounter() as counter:`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Operators = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count_sent(func, args)
        elif func is not torch.ops.prim.device.default and not func.is_view and func._overloadpacket not in EMPTY:
            self._count(func, args, kwargs or {}, out)
        return out

    def _count_sent(self, func: Any, args: tuple[Any, ...]) -> None:
        for name, (index, rounds) in COLLECTIVES.items():
            if name in func.__name__:
                self.send(rounds * sum(tensor.nbytes for tensor in _tensors(args[index])))

    def send(self, n_bytes: int) -> None:
        """Count the bytes that this process sends of those that travel around the ring."""
        n = dist.get_world_size()
        self.operators[LINK, 0.0, n_bytes * (n - 1) / n] += 1

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        packet, flops, share = func._overloadpacket, 0, 1.0
        if (name := func.name()) in ATTENTION:
            flops, share = ATTENTION[name](*args, **kwargs)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        returned = _tensors(out)
        outputs = returned or _tensors(_written(func, args))
        inputs = [] if packet in GATHERING else _tensors((args, kwargs))
        held = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = any(tensor.untyped_storage()._cdata in held for tensor in returned)
        if is_view and not flops and not str(packet).endswith("_"):  # a view by another name, such as _unsafe_view
            return
        moved = [*{id(t): t.nbytes for t in inputs}.values(), *(t.nbytes for t in outputs)]
        if packet in GATHERING:
            moved *= 2
        dtype = str(outputs[0].dtype).removeprefix("torch.") if flops and outputs else ""
        works_on_each = bool(args) and isinstance(args[0], list) and not isinstance(out, Tensor)  # unlike cat and stack
        self.add(dtype, flops, share, moved, len(args[0]) if works_on_each else 1)

    def add(self, dtype: str, flops: int, share: float, moved: list[int], n: int) -> None:
        """Count n equal operators that compute a share of `flops` and move tensors of these bytes together."""
        self.operators[dtype, flops * share / n, sum(moved) / n] += n


def _tensors(values: Any) -> list[Tensor]:
    return [own(value) for value in tree_leaves(values) if isinstance(value, Tensor)]


def _written(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """The arguments written by an operator that returns nothing."""
    written = zip(func._schema.arguments, args, strict=False)
    return [v for each, v in written if each.alias_info and each.alias_info.is_write and each.name not in ONLY_READ]


def scale(operators: Counter[K], factor: float) -> Counter[K]:
    """Multiply the operators' counts, which may become fractions."""
    return Counter({key: count * factor for key, count in operators.items()})


def total(parts: Iterable[Counter[K]]) -> Counter[K]:
    """The sum of all parts' operators. Negative counts, from differences, are kept."""
    summed: Counter[K] = Counter()
    for part in parts:
        summed.update(part)
    return summed


def flops_of(operators: Operators) -> dict[str, float]:
    """FLOPs by dtype."""
    flops: dict[str, float] = defaultdict(float)
    for (dtype, n_flops, _), count in operators.items():
        if n_flops:
            flops[dtype] += n_flops * count
    return dict(flops)


def bytes_of(operators: Operators) -> float:
    """The bytes moved on the card."""
    return sum(n_bytes * count for (dtype, _, n_bytes), count in operators.items() if dtype != LINK)


def sent_of(operators: Operators) -> float:
    """The bytes sent to other cards; equally many are received."""
    return sum(n_bytes * count for (dtype, _, n_bytes), count in operators.items() if dtype == LINK)


def bound_by_resource(operators: Operators, gpu: GpuConfig) -> dict[str, float] | None:
    """The least seconds on a card, by the resource that binds: `memory`, a format of matrix products, `communication`.

    Each operator runs at the rate of the matrix units or of the memory, as in the roofline model (Williams, Waterman
    and Patterson 2009, doi.org/10.1145/1498765.1498785). No kernel reaches this rate, so the result is a bound; the
    share of it that a card reaches can be measured (`calibration.py`). None if a rate is not known.
    """
    if gpu.bandwidth_gb_s is None:
        return None
    seconds_by: dict[str, float] = {"memory": 0.0}
    for (dtype, flops, n_bytes), count in operators.items():
        if (rate := gpu.link_gb_s if dtype == LINK else gpu.bandwidth_gb_s) is None:
            return None
        resource, seconds = dtype if dtype == LINK else "memory", n_bytes / (rate * GIGA)
        if flops:
            rate = getattr(gpu.tflops, RATES.get(dtype, ""), None)
            if rate is None:
                return None
            if (computing := flops / (rate * TERA)) > seconds:
                resource, seconds = RATES[dtype], computing
        seconds_by[resource] = seconds_by.get(resource, 0.0) + seconds * count
    return seconds_by


def least_seconds(bound_s: dict[str, float]) -> float:
    """The bound over all resources: communication overlaps with computation."""
    return max(sum(seconds for name, seconds in bound_s.items() if name != LINK), bound_s.get(LINK, 0.0))


def binding(bound_s: dict[str, float]) -> str:
    """The resource that binds longest."""
    if bound_s.get(LINK, 0.0) >= least_seconds(bound_s) > 0:
        return LINK
    return max((name for name in bound_s if name != LINK), key=bound_s.__getitem__)
