"""The work that every side does, the plain loop that most sides use, and its timing.

A side runs in its own Python, so this imports only PyTorch. Weights have transformers' names and rotary layout.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """The sizes of a LLaMA decoder."""

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    ffn_dim: int = 1376
    vocab_size: int = 32000
    max_seq_len: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0


SIZES = Sizes()
OURS = "llama_ft"  # our side
LORA_RANK, LORA_ALPHA, LORA_DROPOUT, LORA_TARGETS = 16, 32, 0.05, ("q_proj", "v_proj")
ADAMW: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0}
WINDOW = 8  # samples in an optimizer step with gradient accumulation
N_SAMPLES, PROMPT_SHARE, IGNORED = 200, 0.6, -100
N_WARM_UP = 4  # samples: the last ones, whose lengths differ from those timed first
Pair = tuple[Tensor, Tensor]  # int64 [1, T] tokens and labels, the prompt's IGNORED; not shifted
Forward = Callable[[Tensor, Tensor], Tensor]  # the mean loss of a sample's target tokens


class Row(str):
    """A combination of techniques, such as `ga_mp_lora`; only we have `packed`."""

    def has(self, technique: str) -> bool:
        """Return True if a technique is on."""
        return technique in self.split("_")

    @property
    def window(self) -> int:
        """The number of samples in an optimizer step."""
        return WINDOW if self.has("ga") else 1

    def of_side(self, side: str) -> "Row":
        """The row that a side runs: the peers do not pack."""
        return self if side == OURS else Row(self.removesuffix("_packed"))


ROWS = [Row(name) for name in "baseline ga mp lora ga_mp ga_lora mp_lora ga_mp_lora ga_packed ga_lora_packed".split()]


def weights() -> dict[str, Tensor]:
    """Normal(0, 0.02) for matrices, 1 for norms; the same on all sides."""
    c, generator = SIZES, torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator)

    out = {"model.embed_tokens.weight": matrix(c.vocab_size, c.dim)}
    for layer in range(c.n_layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            out[f"{prefix}self_attn.{name}_proj.weight"] = matrix(c.dim, c.dim)
        for name, shape in (("gate", (c.ffn_dim, c.dim)), ("up", (c.ffn_dim, c.dim)), ("down", (c.dim, c.ffn_dim))):
            out[f"{prefix}mlp.{name}_proj.weight"] = matrix(*shape)
        for name in ("input", "post_attention"):
            out[f"{prefix}{name}_layernorm.weight"] = torch.ones(c.dim)
    return out | {"model.norm.weight": torch.ones(c.dim), "lm_head.weight": matrix(c.vocab_size, c.dim)}


def lora_a(layer: int, target: str) -> Tensor:
    """An adapter's initial A, [rank, dim], Kaiming-uniform; its B is zero."""
    generator = torch.Generator().manual_seed(1000 + 10 * layer + LORA_TARGETS.index(target))
    bound = 1 / math.sqrt(SIZES.dim)
    return torch.empty(LORA_RANK, SIZES.dim).uniform_(-bound, bound, generator=generator)


def samples() -> list[Pair]:
    """Samples with ragged lengths like Alpaca's; tokens are Zipf-distributed, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.exp(math.log(90) + 0.55 * torch.randn(N_SAMPLES, generator=generator))
    frequencies = 1 / torch.arange(1, SIZES.vocab_size - 2, dtype=torch.float64)
    pairs = []
    for length in lengths.round().clamp(32, SIZES.max_seq_len).long().tolist():
        tokens = torch.multinomial(frequencies, length, replacement=True, generator=generator) + 3
        labels = tokens.clone()
        labels[: round(PROMPT_SHARE * length)] = IGNORED
        pairs.append((tokens[None], labels[None]))
    return pairs


def n_targets(labels: Tensor) -> int:
    """The number of tokens trained on."""
    return int((labels != IGNORED).sum())


class Meter:
    """Times a training, and records its losses and peak memory."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.losses: list[tuple[float, int, int]] = []  # (mean loss, target tokens, samples)
        self.n_tokens = 0

    def start(self) -> None:
        """Start timing and, if the system allows it, peak memory: creating weights is not training."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._began = time.perf_counter()

    def add(self, loss: float, targets: int, tokens: int, n_samples: int = 1) -> None:
        """Record a micro-batch, or a window."""
        self.losses.append((loss, targets, n_samples))
        self.n_tokens += tokens

    def stop(self) -> dict[str, Any]:
        """Stop, and return the measurements."""
        seconds = time.perf_counter() - self._began
        status = Path("/proc/self/status").read_text()
        return {
            "seconds": seconds,
            "tokens": self.n_tokens,
            "tokens_per_s": self.n_tokens / seconds,
            "peak_rss_mib": int(status.split("VmHWM:")[1].split()[0]) / 1024,
            "first_loss": mean_loss(self.losses, self.window),  # before the first update: dropout has no effect yet
            "last_loss": mean_loss(self.losses[::-1], WINDOW),
        }


def mean_loss(losses: Iterable[tuple[float, int, int]], n_samples: int) -> float:
    """The mean loss over the target tokens of the first `n_samples` samples."""
    total, n_tokens = 0.0, 0
    for loss, targets, size in losses:
        if n_samples <= 0:
            break
        total, n_tokens, n_samples = total + loss * targets, n_tokens + targets, n_samples - size
    return total / n_tokens


def arguments() -> argparse.Namespace:
    """Parse a side's arguments, and prepare PyTorch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side")
    parser.add_argument("row", type=Row)
    parser.add_argument("samples", type=int)
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def autocast(row: Row) -> torch.autocast:
    """Autocast to bf16 if mixed precision is on."""
    return torch.autocast("cpu", torch.bfloat16, enabled=row.has("mp"))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def warm_up(row: Row, forward: Forward, optimizer: torch.optim.Optimizer) -> None:
    """Do untimed steps, like our dry run: they create the optimizer's state, which is 0 after, and keep the weights."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for tokens, labels in samples()[-N_WARM_UP:]:
        with autocast(row):
            loss = forward(tokens, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for tensor in chain.from_iterable(state.values() for state in optimizer.state.values()):
        tensor.zero_()


def plain_loop(args: argparse.Namespace, model: nn.Module, forward: Forward) -> dict[str, Any]:
    """A training loop without a framework around the model. GA takes the mean of the samples' means; no clipping."""
    model.train()
    row, optimizer = args.row, torch.optim.AdamW(trained(model), fused=True, **ADAMW)
    pairs, meter = samples()[: args.samples], Meter(row.window)
    warm_up(row, forward, optimizer)
    meter.start()
    for number, (tokens, labels) in enumerate(pairs, 1):
        with autocast(row):
            loss = forward(tokens, labels)
        (loss / row.window).backward()
        if number % row.window == 0 or number == len(pairs):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        meter.add(loss.item(), n_targets(labels), tokens.numel())
    return meter.stop()


def tell(args: argparse.Namespace, measured: dict[str, Any], packages: Sequence[str] = ()) -> None:
    """Print a run's line of JSON."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", *packages)}
    print(json.dumps(measured | {"versions": versions}), flush=True)
