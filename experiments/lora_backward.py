"""What the backward pass of LLaMA-2-7B computes, by what it is for: on fake tensors, counted as the planner counts."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from experiments.builtin import model_config
from experiments.lora import ROLES
from llama_ft.model.transformer import Transformer
from llama_ft.planning.operators import ATTENTION
from llama_ft.techniques.lora import add_lora

LENGTH = 404  # tokens: the longest of Alpaca's first 200 samples


class FlopsByRole(TorchDispatchMode):
    """FLOPs of operators whose output has a weight's shape, of attention, and of other matrix products."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        shapes = [tuple(parameter.shape) for parameter in model.parameters()]
        self.shapes = {*shapes, *(shape[::-1] for shape in shapes)}
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in ATTENTION:
            self.flops[ROLES[2]] += round(ATTENTION[packet](*args, **(kwargs or {})))
        elif packet in flop_registry:
            role = ROLES[0] if tuple(out.shape) in self.shapes else ROLES[1]
            self.flops[role] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def backward_flops(lora: bool) -> dict[str, int]:
    """FLOPs of a forward pass, and of the backward pass by role; with the course's adapter, or training all weights."""
    with FakeTensorMode():
        model = Transformer(model_config("llama2_7b"))
        if lora:
            add_lora(model, 16, 32.0, 0.0, ["wq", "wv"])
        counter = FlopsByRole(model)

        def counted(act: Callable[[], Any]) -> Any:
            counter.flops.clear()
            with counter:
                return act()

        loss = counted(lambda: model(torch.zeros(1, LENGTH, dtype=torch.int64)).logsumexp(-1).sum())
        forward = counter.flops.total()
        counted(lambda: loss.backward())
    return {"forward": forward} | {role: counter.flops[role] for role in ROLES}
