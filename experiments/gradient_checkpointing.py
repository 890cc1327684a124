"""`python -m experiments.gradient_checkpointing`: memory and forward passes of five ways to keep activations.

The textbook counts n equal layers, each of which keeps one tensor. Here they are linear layers in the library's model,
run and checkpointed by the library; only to keep nothing at all, which nobody would do, is written here. Then LLaMA's
own block, which keeps far more than its input.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

from experiments.figure import BLUE, GREEN, GREY, ORANGE, PINK, drawn
from experiments.study import Claim, Numbers, Options, Study, main, table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llama_ft.model.transformer import Caches, Transformer

SQUARES = (16, 36, 64, 144, 256)  # numbers of layers that have a square root
WIDTH, TOKENS = 64, 32  # of the textbook's layers
N_BLOCKS, BLOCK_TOKENS = 16, 128  # of the tiny model's shape
WAYS: dict[str, Callable[[int], int | None]] = {
    "keep all": lambda n: 0,
    "keep none": lambda n: None,
    "one checkpoint": lambda n: n,
    "every sqrt(n)-th": math.isqrt,
    "every layer": lambda n: 1,
}
"""What is kept of n layers: every how-maniest layer's input; 0 is everything, None nothing but the first input."""
COLOURS = dict(zip(WAYS, (ORANGE, GREEN, PINK, BLUE, GREY), strict=True))
LEAST_OF_ALL = 0.95  # share of all activations that is no saving
NEAR = 0.1  # how far an exponent may be from the textbook's


def textbook_model(n_layers: int) -> "Transformer":
    """The library's model around n linear layers, each of which keeps its input for backward, and no more."""
    import torch
    from torch import nn

    from llama_ft.config import ModelConfig
    from llama_ft.model.transformer import Transformer

    class Layer(nn.Linear):
        def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model = Transformer(ModelConfig("textbook", WIDTH, 1, 1, 1, vocab_size=16, ffn_dim=16, context=TOKENS))
    model.layers = nn.ModuleList(Layer(WIDTH, WIDTH, bias=False) for _ in range(n_layers))
    return randomised(model, WIDTH**-0.5)


def llama_model(n_layers: int) -> "Transformer":
    """As many blocks of the tiny model's shape, between a small embedding and head."""
    from dataclasses import replace

    import torch

    from experiments.builtin import model_config
    from llama_ft.model.transformer import Transformer

    torch.manual_seed(0)
    return randomised(Transformer(replace(model_config("tiny"), n_layers=n_layers, vocab_size=16)), 0.05)


def randomised(model: "Transformer", std: float) -> "Transformer":
    """Random weights, of a size that neither blows up nor dies out however many layers there are."""
    import torch

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def keep_nothing(model: "Transformer") -> None:
    """Make the model keep its first layer's input alone, and compute each layer's anew from there in backward."""
    import torch

    run_layers = model.run_layers

    class FromTheStart(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: "Tensor", layers: "nn.ModuleList", rotary: "Tensor", caches: "Caches") -> "Tensor":
            ctx.save_for_backward(x)
            ctx.others = layers, rotary, caches
            return run_layers(layers, x, rotary, None, caches)

        @staticmethod
        def backward(ctx: Any, gradient: "Tensor") -> tuple["Tensor", None, None, None]:
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
        layers: "nn.ModuleList", x: "Tensor", rotary: "Tensor", mask: "Tensor | None", caches: "Caches"
    ) -> "Tensor":
        assert mask is None
        out: Tensor = FromTheStart.apply(x, layers, rotary, caches)  # type: ignore[no-untyped-call]
        return out

    model.run_layers = run_from_the_start


def prepared(model: "Transformer", way: str) -> "Transformer":
    """The model, run that way."""
    from llama_ft.techniques.gradient_checkpointing import checkpoint_layers

    every = WAYS[way](len(model.layers))
    if every is None:
        keep_nothing(model)
    elif every:
        checkpoint_layers(model, every)
    return model


def passes(model: "Transformer", n_tokens: int, trains: bool = True) -> dict[str, Any]:
    """A forward pass, and a backward pass if it trains: the most bytes of activations, forward passes of layers."""
    import torch

    from llama_ft.measure.memory import MemoryTracker
    from llama_ft.measure.result import MB

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
    return {"bytes": round(tracker.result().max_mb["activation"] * MB), "forwards": n_forward}


def textbook(say: Callable[[str], None]) -> dict[str, dict[str, list[int]]]:
    """Bytes and forward passes by way, for each number of layers; and bytes of inference."""
    found: dict[str, dict[str, list[int]]] = {}
    for way in WAYS:
        say(f"{way} of up to {max(SQUARES)} layers")
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
    import torch

    def gradients(way: str) -> "Tensor":
        model = prepared(llama_model(4), way)
        passes(model, TOKENS)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradients("keep all")
    return {way: (gradients(way) - plain).abs().max().item() for way in WAYS if way != "keep all"}


def exponent(values: Sequence[float]) -> float:
    """The power of n with which the values grow: the slope of a line through them on logarithmic axes."""
    return linear_regression([math.log(n) for n in SQUARES], [math.log(value) for value in values]).slope


def claims_of(numbers: Numbers) -> list[Claim]:
    """What the numbers say of each claim."""
    measured, llama, n = numbers["textbook"], numbers["blocks"], SQUARES[-1]
    power = {way: {key: exponent(each[key]) for key in ("bytes", "forwards")} for way, each in measured.items()}
    most = {way: each["forwards"][-1] for way, each in measured.items()}

    def growth(way: str, memory: float, forwards: float, times: int | None = None) -> tuple[bool, dict[str, float]]:
        """Whether exponents are the textbook's, and forward passes so many times n; and what was found."""
        found = {"exponent of memory": power[way]["bytes"], "of forward passes": power[way]["forwards"]}
        near = all(abs(one - other) <= NEAR for one, other in zip(found.values(), (memory, forwards), strict=True))
        return near and times in (None, most[way] / n), found | {f"forward passes at {n}": most[way]}

    as_plain = measured["one checkpoint"]["bytes"][-1] / measured["keep all"]["bytes"][-1]
    at_once, found = growth("one checkpoint", 1, 1, times=2)
    every, root = (llama["ways"][way] for way in ("every layer", "every sqrt(n)-th"))
    apart = max(numbers["gradients_apart"].values())
    return [
        Claim("keep everything: memory O(n), n forward passes", *growth("keep all", 1, 1, times=1)),
        Claim(
            "keep nothing, compute each layer anew from the first input: memory O(1), forward passes O(n^2)",
            *growth("keep none", 0, 2),
        ),
        Claim(
            "keep nothing, compute all anew at once: 2 n forward passes, but memory O(n), nothing saved",
            at_once and as_plain >= LEAST_OF_ALL,
            found | {"times that of keep all": as_plain},
        ),
        Claim(
            "keep every sqrt(n)-th: memory O(sqrt(n)), 2 n forward passes",
            *growth("every sqrt(n)-th", 0.5, 1, times=2),
        ),
        Claim("inference keeps nothing: memory O(1), n forward passes", *growth("inference", 0, 1, times=1)),
        Claim("each way gives the gradients of the plain one, to the bit", apart == 0, {"largest difference": apart}),
        Claim(
            "a LLaMA block keeps 10 times its input or more, so that every block, in as many forward passes, needs less"
            " than every sqrt(n)-th",
            llama["times_its_input"] >= 10 and every["bytes"] < root["bytes"] and every["forwards"] == root["forwards"],
            {
                "times its input": llama["times_its_input"],
                "kB, keep all": llama["ways"]["keep all"]["bytes"] / 1000,
                "every sqrt(n)-th": root["bytes"] / 1000,
                "every block": every["bytes"] / 1000,
            },
        ),
    ]


def table_of(numbers: Numbers) -> str:
    """Activations and forward passes by way and number of layers."""
    titles = ("kB of activations / forward passes", *(f"n = {n}" for n in SQUARES))
    rows = [
        [way, *(f"{b / 1000:,.0f} / {f:,}" for b, f in zip(each["bytes"], each["forwards"], strict=True))]
        for way, each in numbers["textbook"].items()
    ]
    return table(titles, rows)


def draw(numbers: Numbers, file: Path) -> None:
    """Memory and forward passes against the number of layers; ways that take the same are one line."""
    with drawn(file, ("activations of n layers, kB", "forward passes of layers")) as (memory, forwards):
        for axes, key, factor in ((memory, "bytes", 1e-3), (forwards, "forwards", 1.0)):
            alike: dict[int, list[str]] = {}
            for way in WAYS:
                last = numbers["textbook"][way][key][-1]
                same = next((other for other in alike if abs(other - last) < 0.01 * last), last)
                alike.setdefault(same, []).append(way)
            for ways in alike.values():
                values = [factor * value for value in numbers["textbook"][ways[0]][key]]
                label = f"{', '.join(ways)}: $n^{{{exponent(values):.2f}}}$".replace("sqrt(n)", r"$\sqrt{n}$")
                axes.plot(SQUARES, values, "o-", color=COLOURS[ways[0]], lw=3, ms=9, label=label)
            axes.set(xscale="log", yscale="log", xlabel="n")
            axes.set_xticks(list(SQUARES), [str(n) for n in SQUARES])
            axes.minorticks_off()
            axes.set_ylim(top=axes.get_ylim()[1] * 40)
            axes.legend(frameon=False, loc="upper left", fontsize=13)


def measure(options: Options, say: Callable[[str], None]) -> Numbers:
    """Count, all layers and blocks in all ways."""
    return {"textbook": textbook(say), "blocks": blocks(), "gradients_apart": gradients_apart()}


STUDY = Study("gradient_checkpointing", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    sys.exit(main(STUDY))
