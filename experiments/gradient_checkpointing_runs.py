"""The measurements of `experiments.gradient_checkpointing`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.builtin import model_config
from experiments.gradient_checkpointing import SQUARES, WAYS
from llama_ft.config import ModelConfig
from llama_ft.measure.memory import MemoryTracker
from llama_ft.model.transformer import Caches, Transformer
from llama_ft.system import MIB
from llama_ft.techniques.gradient_checkpointing import checkpoint_layers

WIDTH, TOKENS = 64, 32  # of the textbook's layers
N_BLOCKS, BLOCK_TOKENS = 16, 128  # of the tiny model's shape


def textbook_model(n_layers: int) -> Transformer:
    """The library's model around n linear layers, each of which keeps its input for backward, and no more."""

    class Layer(nn.Linear):
        def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model = Transformer(ModelConfig("textbook", WIDTH, 1, 1, 1, vocab_size=16, ffn_dim=16, max_seq_len=TOKENS))
    model.layers = nn.ModuleList(Layer(WIDTH, WIDTH, bias=False) for _ in range(n_layers))
    return randomised(model, WIDTH**-0.5)


def llama_model(n_layers: int) -> Transformer:
    """As many blocks of the tiny model's shape, between a small embedding and head."""
    torch.manual_seed(0)
    return randomised(Transformer(replace(model_config("tiny"), n_layers=n_layers, vocab_size=16)), 0.05)


def randomised(model: Transformer, std: float) -> Transformer:
    """Random weights, of a size that neither blows up nor dies out however many layers there are."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def keep_nothing(model: Transformer) -> None:
    """Make the model keep its first layer's input alone, and compute each layer's anew from there in backward."""
    run_layers = model.run_layers

    class FromTheStart(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, layers: nn.ModuleList, rotary: Tensor, caches: Caches) -> Tensor:
            ctx.save_for_backward(x)
            ctx.others = layers, rotary, caches
            return run_layers(layers, x, rotary, None, caches)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
            (first,), (layers, rotary, caches) = ctx.saved_tensors, ctx.others
            for last in reversed(range(len(layers))):
                x = run_layers(layers[:last], first, rotary, None, caches[:last]).detach().requires_grad_()
                with torch.enable_grad():
                    y = run_layers(layers[last : last + 1], x, rotary, None, caches[:1])
                torch.autograd.backward(y, gradient)
                assert x.grad is not None
                gradient = x.grad
            return gradient, None, None, None

    def run_from_the_start(
        layers: nn.ModuleList, x: Tensor, rotary: Tensor, mask: Tensor | None, caches: Caches
    ) -> Tensor:
        assert mask is None
        out: Tensor = FromTheStart.apply(x, layers, rotary, caches)  # type: ignore[no-untyped-call]
        return out

    model.run_layers = run_from_the_start


def prepared(model: Transformer, way: str) -> Transformer:
    """The model, run that way."""
    every = WAYS[way](len(model.layers))
    if every is None:
        keep_nothing(model)
    elif every:
        checkpoint_layers(model, every)
    return model


def passes(model: Transformer, n_tokens: int, trains: bool = True) -> dict[str, Any]:
    """A forward pass, and a backward pass if it trains: the most bytes of activations, forward passes of layers."""
    tokens, n_forward = torch.arange(n_tokens)[None] % model.config.vocab_size, 0
    last = torch.tensor([n_tokens - 1])  # where the head is asked, so that it takes next to nothing

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


def textbook(log: Callable[[str], None]) -> dict[str, dict[str, list[int]]]:
    """Bytes and forward passes by way, for each number of layers; and bytes of inference."""
    found: dict[str, dict[str, list[int]]] = {}
    for way in WAYS:
        log(f"{way} of up to {max(SQUARES)} layers")
        each = [passes(prepared(textbook_model(n), way), TOKENS) for n in SQUARES]
        found[way] = {key: [one[key] for one in each] for key in ("bytes", "forwards")}
    inference = [passes(textbook_model(n), TOKENS, trains=False) for n in SQUARES]
    return found | {"inference": {key: [one[key] for one in inference] for key in ("bytes", "forwards")}}


def blocks() -> dict[str, Any]:
    """LLaMA's block: bytes that it keeps and bytes of its input, and what each way takes for a model of them."""
    found = {way: passes(prepared(llama_model(N_BLOCKS), way), BLOCK_TOKENS) for way in WAYS}
    more = passes(prepared(llama_model(2 * N_BLOCKS), "keep all"), BLOCK_TOKENS)["bytes"]
    kept = (more - found["keep all"]["bytes"]) / N_BLOCKS
    a_input = BLOCK_TOKENS * llama_model(1).config.dim * 4
    return {"ways": found, "kept_bytes": kept, "input_bytes": a_input, "times_its_input": kept / a_input}


def gradients_apart() -> dict[str, float]:
    """The largest difference of any way's gradients from those with everything kept, of LLaMA's blocks."""

    def gradients(way: str) -> Tensor:
        model = prepared(llama_model(4), way)
        passes(model, TOKENS)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradients("keep all")
    return {way: (gradients(way) - plain).abs().max().item() for way in WAYS if way != "keep all"}
