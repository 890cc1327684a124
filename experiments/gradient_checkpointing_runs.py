"""The measurements of `experiments.gradient_checkpointing`."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.shared import gradient_of, model_config
from experiments.study import Log, Numbers
from llama_ft.config import ModelConfig
from llama_ft.measure.memory import MemoryTracker
from llama_ft.model.attention import Mask
from llama_ft.model.transformer import Caches, Transformer
from llama_ft.system import MIB
from llama_ft.techniques.gradient_checkpointing import checkpoint_layers

SQUARES = (16, 36, 64, 144, 256)  # numbers of layers that have a square root
WAYS: dict[str, Callable[[int], int | None]] = {
    "keep all": lambda n: 0,
    "keep none": lambda n: None,
    "one checkpoint": lambda n: n,
    "every sqrt(n)-th": math.isqrt,
    "every layer": lambda n: 1,
}
"""For n layers, the number of layers per kept input; 0 keeps everything, None only the first input."""
WIDTH, TOKENS = 64, 32  # of the textbook's layers
N_BLOCKS, BLOCK_TOKENS = 16, 128  # of the tiny model's shape


def textbook_model(n_layers: int) -> Transformer:
    """The library's model around n linear layers that keep only their input for backward."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor, *_: object) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model = Transformer(ModelConfig("textbook", WIDTH, 1, 1, 1, vocab_size=16, ffn_dim=16, max_seq_len=TOKENS))
    model.layers = nn.ModuleList(Layer(WIDTH, WIDTH, bias=False) for _ in range(n_layers))
    return randomized(model, WIDTH**-0.5)


def llama_model(n_layers: int) -> Transformer:
    """Blocks of the tiny model's shape, between a small embedding and head."""
    torch.manual_seed(0)
    return randomized(Transformer(replace(model_config("tiny"), n_layers=n_layers, vocab_size=16)), 0.05)


def randomized(model: Transformer, std: float) -> Transformer:
    """Give a model random weights of a size that neither explodes nor vanishes with many layers."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def keep_nothing(model: Transformer) -> None:
    """Make the model keep only its first layer's input, and recompute each layer's input from it in backward."""
    run_layers = model.run_layers

    class FromTheStart(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, layers: nn.ModuleList, turns: Tensor, caches: Caches) -> Tensor:
            ctx.save_for_backward(x)
            ctx.others = layers, turns, caches
            return run_layers(layers, x, turns, None, caches)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
            (first,), (layers, turns, caches) = ctx.saved_tensors, ctx.others
            for last in reversed(range(len(layers))):
                x = run_layers(layers[:last], first, turns, None, caches[:last]).detach().requires_grad_()
                with torch.enable_grad():
                    y = run_layers(layers[last : last + 1], x, turns, None, caches[:1])
                torch.autograd.backward(y, gradient)
                assert x.grad is not None
                gradient = x.grad
            return gradient, None, None, None

    def run_from_the_start(layers: nn.ModuleList, x: Tensor, turns: Tensor, mask: Mask, caches: Caches) -> Tensor:
        assert mask is None
        out: Tensor = FromTheStart.apply(x, layers, turns, caches)  # type: ignore[no-untyped-call]
        return out

    model.run_layers = run_from_the_start


def prepared(model: Transformer, way: str) -> Transformer:
    """The model, set up to keep activations in the given way."""
    every = WAYS[way](len(model.layers))
    if every is None:
        keep_nothing(model)
    elif every:
        checkpoint_layers(model, every)
    return model


def passes(model: Transformer, n_tokens: int, trains: bool = True) -> dict[str, int]:
    """The peak bytes of activations and the forward passes of layers, in a forward and, if it trains, backward pass."""
    tokens, n_forward = torch.arange(n_tokens)[None] % model.config.vocab_size, 0
    last = torch.tensor([n_tokens - 1])  # the head's only position, so that it costs next to nothing

    def count(*_: object) -> None:
        nonlocal n_forward
        n_forward += 1

    for layer in model.layers:
        layer.register_forward_pre_hook(count)
    with (
        torch.set_grad_enabled(trains),
        MemoryTracker(model, torch.optim.SGD(model.parameters()), [tokens, last]) as tracker,
    ):
        loss = model(tokens, logits_at=last).logsumexp(-1).sum()
        if trains:
            loss.backward()
    return {"bytes": round(tracker.result().max_mib["activation"] * MIB), "forwards": n_forward}


def textbook(log: Log) -> Numbers:
    """Bytes and forward passes by method, for each number of layers, and those of inference."""

    def by_size(way: str, trains: bool) -> dict[str, list[int]]:
        counts = [passes(prepared(textbook_model(n), way), TOKENS, trains) for n in SQUARES]
        return {key: [count[key] for count in counts] for key in ("bytes", "forwards")}

    measured = {}
    for way in WAYS:
        log(f"{way} of up to {max(SQUARES)} layers")
        measured[way] = by_size(way, trains=True)
    return measured | {"inference": by_size("keep all", trains=False)}


def blocks() -> Numbers:
    """The bytes that a LLaMA block keeps, the bytes of its input, and each method's costs for a model of blocks."""
    ways = {way: passes(prepared(llama_model(N_BLOCKS), way), BLOCK_TOKENS) for way in WAYS}
    of_twice_as_many = passes(llama_model(2 * N_BLOCKS), BLOCK_TOKENS)["bytes"]
    kept = (of_twice_as_many - ways["keep all"]["bytes"]) / N_BLOCKS
    input_bytes = BLOCK_TOKENS * model_config("tiny").dim * 4
    return {"ways": ways, "kept_bytes": kept, "input_bytes": input_bytes, "times_its_input": kept / input_bytes}


def gradients_apart() -> dict[str, float]:
    """The largest difference of each method's gradients from those with everything kept, for LLaMA's blocks."""

    def gradients(way: str) -> Tensor:
        model = prepared(llama_model(4), way)
        passes(model, TOKENS)
        return gradient_of(model)

    plain = gradients("keep all")
    return {way: (gradients(way) - plain).abs().max().item() for way in WAYS if way != "keep all"}
