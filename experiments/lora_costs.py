"""LoRA's costs and savings: FLOPs and time of the forward pass, FLOPs of 7B's backward pass by purpose."""

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any, ClassVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from experiments.shared import load_tiny, model_config
from experiments.study import Numbers
from llama_ft.model.transformer import Transformer
from llama_ft.planning.operators import ATTENTION
from llama_ft.techniques.lora import add_lora, lora_layers

LENGTH = 64  # tokens whose FLOPs are counted, for tiny
N_TOKENS = 404  # for 7B: the longest of Alpaca's first 200 samples
ROLES = ("gradients of weights", "gradients of inputs")  # the results of a backward pass


def tiny(lora: bool) -> Transformer:
    """The built-in model in fp32, with or without the course's adapter."""
    model = load_tiny()
    if lora:
        add_lora(model)  # its defaults are the course's: r = 16, alpha = 32, q and v
    return model.eval()


def flops() -> dict[str, int]:
    """FLOPs of a forward pass of the tiny model: without adapter, with it next to the weights, and merged."""
    tokens = torch.arange(1, LENGTH + 1)[None]

    def counted(act: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            act()
        return int(counter.get_total_flops())

    bare, adapted = tiny(lora=False), tiny(lora=True)
    counts = {"forward": counted(lambda: bare(tokens)), "forward_beside": counted(lambda: adapted(tokens))}
    for layer in lora_layers(adapted).values():
        layer.merge()
    with torch.no_grad():
        return counts | {"forward_merged": counted(lambda: adapted(tokens))}


def latency(rounds: int) -> dict[str, float]:
    """Median seconds to compute a token with the adapter next to the weights and merged, in turns."""
    models = {"beside": tiny(lora=True), "merged": tiny(lora=True)}
    for layer in lora_layers(models["merged"]).values():
        layer.merge()
    tokens, seconds = torch.ones(1, 1, dtype=torch.int64), {"beside": [0.0], "merged": [0.0]}
    with torch.inference_mode():
        for number in range(rounds + 10):
            for name in ("beside", "merged") if number % 2 else ("merged", "beside"):
                began = time.thread_time()
                models[name](tokens)
                if number >= 10:  # the first ones are a warm-up
                    seconds[name].append(time.thread_time() - began)
    return {name: median(times[1:]) for name, times in seconds.items()}


class FlopsByOperator(TorchDispatchMode):
    """Counts FLOPs of attention, and of matrix products by weight and by role: the result is its gradient, or not.

    Shapes identify the weights, since no weight has a side of `N_TOKENS`.
    """

    OPERATORS: ClassVar = {
        (4096, 4096): "wq, wk, wv, wo",
        (4096, 11008): "w1, w2, w3",
        (4096, 32000): "output",
        (16, 4096): "LoRA's A, B",
    }

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if (name := func.name()) in ATTENTION:
            flops, share = ATTENTION[name](*args, **(kwargs or {}))
            self.flops["attention", ROLES[1]] += round(flops * share)
        elif packet in flop_registry:
            shapes = [tuple(sorted(tensor.shape)) for tensor in (out, *args)]
            (weight,) = {shape for shape in shapes if shape in self.OPERATORS}
            role = ROLES[0] if shapes[0] == weight else ROLES[1]
            self.flops[self.OPERATORS[weight], role] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def backward_flops(lora: bool) -> Numbers:
    """FLOPs of a forward pass, and of the backward pass by role and operator, for the adapter or for all weights.

    Counted on fake tensors, as in the planner.
    """
    with FakeTensorMode():
        model = Transformer(model_config("llama2_7b"))
        if lora:
            add_lora(model)
        counter = FlopsByOperator()

        def counted(act: Callable[[], Any]) -> Any:
            counter.flops.clear()
            with counter:
                return act()

        loss = counted(lambda: model(torch.zeros(1, N_TOKENS, dtype=torch.int64)).logsumexp(-1).sum())
        forward = counter.flops.total()
        counted(lambda: loss.backward())
    backward: Numbers = {role: {} for role in ROLES}
    for (operator, role), n in counter.flops.items():
        backward[role][operator] = n
    return {"forward": forward} | backward
