"""Tracks which tensors are alive when memory peaks: parameters, gradients, optimizer state, activations.

The tracker watches every operator's outputs and logs when their storages are created and freed. A storage's category
may become known only later (a gradient is first the output of a matrix product), so peaks are found afterwards, by
replaying the log with the final categories.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from llama_ft.measure.collectives import GlooReferences
from llama_ft.model.sharded import is_split, own
from llama_ft.records import CATEGORIES
from llama_ft.records.result import MemoryItem
from llama_ft.system import MIB


@dataclass(eq=False)
class Allocation:
    """A storage while it lives."""

    nbytes: int
    dtype: torch.dtype
    category: str
    item: str = ""  # details that the category does not give


EVALUATION = "evaluation"  # a phase
Event = tuple[Allocation, int, str]  # +1 when created and -1 when freed, and the phase


@dataclass(frozen=True)
class MemoryUse:
    """The memory use of a tracked pass, in MiB."""

    peak_mib: float
    phase: str  # when memory peaked: forward, backward, optimizer step or evaluation
    at_peak_mib: dict[str, float]  # by category; they sum to the peak
    max_mib: dict[str, float]  # each category's own maximum
    breakdown: list[MemoryItem]  # the peak by category and dtype


class MemoryTracker(TorchDispatchMode):
    """Watches the training steps done inside `with MemoryTracker(...):`.

    Categories: `parameter`, weights and the 16-bit copies that autocast makes of them; `gradient`, tensors that become
    a parameter's gradient; `optimizer_state`, tensors that the optimizer allocates in a step; `activation`, every other
    tensor made in forward and backward, including temporaries; `gathered`, rows that FSDP gathers from other processes
    and gradient sums meant for them, with the buffers in between; `other`, buffers and tensors that the caller names.
    Of tensors split over processes, only this process's part counts.

    Workspaces inside operators are not seen; on CUDA the allocator's own peak includes them.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and excluding PyTorch's compiler would import it

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, others: Iterable[Tensor] = (), round_to: int = 1
    ) -> None:
        """Watch a model, its optimizer and batches' tensors; sizes are rounded up to multiples of `round_to`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._optimizer, self._others, self._round_to = model, optimizer, tuple(others), round_to
        parameter = own(next(model.parameters()))
        self._device_type, self._is_fake = parameter.device.type, hasattr(parameter, "fake_mode")
        self._live: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._gathered: dict[int, None] = {}  # the keys that FSDP may free without an operator
        self._gloo = GlooReferences()
        self.events: list[Event] = []
        self._phase = "load"
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for parameter in self._model.parameters():
            self._see(own(parameter), "parameter")
            if parameter.requires_grad and not is_split(parameter):
                self._handles.append(parameter.register_hook(partial(self._claim, category="gradient")))
        for buffer in self._model.buffers():
            self._see(buffer, "other", "buffers")
        for state in self._optimizer.state.values():
            for tensor in state.values():
                self._see(own(tensor), "optimizer_state")
        self.watch(self._others)
        self._handles += [
            self._model.register_forward_pre_hook(self._at("forward")),
            self._model.register_forward_hook(self._at("backward")),
            self._optimizer.register_step_pre_hook(self._before_update),
            self._optimizer.register_step_post_hook(self._after_update),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        super().__exit__(kind, error, tb)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._note_freed()
        self._live.clear()  # also drops the callbacks, so the log ends here

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator and log the storages that it creates."""
        if func is torch.ops.prim.device.default:  # fake tensors' most frequent call, which creates none
            return func(*args, **(kwargs or {}))
        self._gloo.wait()
        self._note_freed()
        if func.namespace in ("fsdp", "c10d") or func is torch.ops.aten.copy_.default:
            self._communicate(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        # A view of an unknown storage is in an operator's own memory, unless torch.tensor made it.
        is_view = func.is_view and func is not torch.ops.aten.lift_fresh.default
        for tensor in () if is_view else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(own(tensor), self._category(func, args))
        return out

    def _note_freed(self) -> None:
        """Log gathered weights whose storages FSDP has freed by resizing them, without an operator."""
        for key in list(self._gathered):
            known = self._live.get(key)
            storage = known and known[0]()
            if known is None or storage is None:
                del self._gathered[key]
            elif storage.nbytes() == 0:
                del self._gathered[key]
                del self._live[key]
                self.events.append((known[1], -1, self._phase))

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Categorize FSDP's tensors: its sums are gradients, all others but weights are gathered.

        A single process copies its weights instead of gathering them.
        """
        if func.namespace == "fsdp" or (func.namespace == "aten" and self._is_weight(args[1])):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and not self._is_weight(tensor):
                    self._see(own(tensor), "gathered")  # its memory may be allocated again
                    self._claim(own(tensor), "gathered")
                    self._gathered[own(tensor).untyped_storage()._cdata] = None
        elif "reduce_scatter" in func.__name__:
            self._claim(args[0], "gradient")
        if func.namespace == "c10d" and self._device_type == "cpu" and not self._is_fake:
            self._gloo.note((args, kwargs))

    def _at(self, phase: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self._phase = phase if self._model.training else EVALUATION

        return hook

    def _before_update(self, *_: object) -> None:
        self._phase = "optimizer step"
        for parameter in self._model.parameters():
            if is_split(parameter):  # FSDP has set its gradient, and allocated equally many rows per process
                self._claim(own(parameter), "parameter")
            if parameter.grad is not None:
                self._claim(own(parameter.grad), "gradient")

    def _after_update(self, *_: object) -> None:
        within_backward = torch._C._current_graph_task_id() != -1
        self._phase = "backward" if within_backward else "after the step"

    def _category(self, func: Any, args: tuple[Any, ...]) -> str:
        if self._phase == "optimizer step":
            return "optimizer_state"
        if func is torch.ops.aten._to_copy.default or func.namespace == "bitsandbytes":  # a weight's copy counts as one
            source = self._live.get(own(args[0]).untyped_storage()._cdata)
            if source is not None and source[1].category in ("parameter", "gathered"):
                return source[1].category
        return "activation"

    def _is_weight(self, tensor: Tensor) -> bool:
        known = self._live.get(own(tensor).untyped_storage()._cdata)
        return known is not None and known[1].category == "parameter"

    def _see(self, tensor: Tensor, category: str, item: str = "") -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or (size := storage.nbytes()) == 0:
            return
        if tensor.device.type != self._device_type:
            return
        allocation = Allocation(-(-size // self._round_to) * self._round_to, tensor.dtype, category, item)

        def freed(_: object) -> None:
            if self._live.pop(key, None) is not None:
                self.events.append((allocation, -1, self._phase))

        self._live[key] = (weakref.ref(storage, freed), allocation)
        self.events.append((allocation, +1, self._phase))

    def _claim(self, tensor: Tensor, category: str) -> None:
        known = self._live.get(tensor.untyped_storage()._cdata)
        if known is not None:
            known[1].category = category

    def watch(self, batch: Iterable[Tensor]) -> None:
        """Count a batch's tensors from now on."""
        for tensor in batch:
            self._see(tensor, "other", "batches")

    def claim_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Count these as gradients; those made by a backward pass are found automatically."""
        for gradient in map(own, gradients):
            self._see(gradient, "gradient")
            self._claim(gradient, "gradient")

    def result(self) -> MemoryUse:
        """Replay the log. Call it after the `with` block."""
        alive = bytes_alive(self.events)
        totals = [sum(now) for now in zip(*alive.values(), strict=True)]
        peak = totals.index(max(totals))
        parts: Counter[tuple[str, str, str]] = Counter()  # bytes at the peak
        for allocation, sign, _ in self.events[: peak + 1]:
            dtype = str(allocation.dtype).removeprefix("torch.")
            parts[allocation.category, dtype, allocation.item] += sign * allocation.nbytes
        return MemoryUse(
            peak_mib=totals[peak] / MIB,
            phase=self.events[peak][2],
            at_peak_mib={name: series[peak] / MIB for name, series in alive.items()},
            max_mib={name: max(series) / MIB for name, series in alive.items()},
            breakdown=[
                MemoryItem(name, dtype, n / MIB, item or None) for (name, dtype, item), n in sorted(parts.items()) if n
            ],
        )


def bytes_alive(events: Sequence[Event]) -> dict[str, list[int]]:
    """The bytes alive after each event, by category."""
    return {
        name: list(accumulate(sign * each.nbytes if each.category == name else 0 for each, sign, _ in events))
        for name in CATEGORIES
    }
