"""The least time that a row's work needs on this machine, from two rates that are measured here.

A pass's matrix products take their FLOPs divided by the machine's rate at their shapes, or the bytes of their weights
and gradients divided by its bandwidth, whichever is longer: a product overlaps its own traffic. AdamW's traffic is
added, since it can begin only when the gradients exist. The traffic of activations, norms, rotations and the loss are
left out.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean
from timeit import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import workload
from benchmarks.peers.workload import LORA_RANK, LORA_TARGETS, SIZES, WINDOW, Row, Sizes
from llama_ft.kernels import has_16bit_products, use_training_kernels

ADAMW_BYTES = 7 * 4  # per trained parameter: weight, gradient and two moments are read, all but the gradient written
ROUNDS = 12  # the fastest counts: a limit is what the machine can do
Length = tuple[int, int]  # a sample's positions that predict a token, and how many of these tokens are trained on
Rates = dict[str, float]  # GFLOP/s by format and kind of row, such as `fp32 apart full`


def lengths(n_samples: int) -> list[Length]:
    """The lengths of the work's samples."""
    pairs = workload.samples()[:n_samples]
    return [(tokens.numel() - 1, workload.n_targets(labels)) for tokens, labels in pairs]


def linear_layers(c: Sizes) -> dict[tuple[int, int], int]:
    """The number of linear layers by inputs and outputs, without the head."""
    return {(c.dim, c.dim): 4 * c.n_layers, (c.dim, c.ffn_dim): 2 * c.n_layers, (c.ffn_dim, c.dim): c.n_layers}


def n_multiplied(c: Sizes) -> int:
    """The number of weights in matrix products: all but embeddings and norms."""
    return sum(n * n_in * n_out for (n_in, n_out), n in linear_layers(c).items()) + c.dim * c.vocab_size


def n_trained(lora: bool, c: Sizes) -> int:
    """The number of trained parameters."""
    if lora:
        return c.n_layers * len(LORA_TARGETS) * LORA_RANK * 2 * c.dim
    return n_multiplied(c) + c.vocab_size * c.dim + (2 * c.n_layers + 1) * c.dim


def flops(length: Length, lora: bool, c: Sizes = SIZES) -> float:
    """FLOPs of one sample's step: 2 per multiply-add, the head only at trained positions, attention causal."""
    positions, targets = length
    layers = 2 * positions * (n_multiplied(c) - c.dim * c.vocab_size)
    head = 2 * targets * c.dim * c.vocab_size
    attention = 3 * 2 * c.n_layers * positions * (positions + 1) * c.dim  # 2 products, and 4 backward
    if not lora:
        return 3 * (layers + head) + attention
    factor = 2 * positions * LORA_RANK * c.dim * len(LORA_TARGETS)  # one of an adapter's two factors, in a layer
    # No gradients of frozen weights, nor of the embeddings, the inputs of the first layer's queries, keys and values.
    return 2 * (layers + head) + attention - 6 * positions * c.dim**2 + factor * (6 * c.n_layers - 1)


def limit(
    row: Row, samples: Sequence[Length], gflop_s: Rates, bandwidth_gb_s: float, c: Sizes = SIZES
) -> dict[str, float]:
    """The least seconds of a row's work on these samples, and the numbers behind them."""
    lora, bandwidth = row.has("lora"), bandwidth_gb_s * 1e9
    # The faster of the formats that a row may compute in: 16-bit operands can be multiplied in fp32.
    rates = [rate for key, rate in gflop_s.items() if key.endswith(kind(row)) and (row.has("mp") or "fp32" in key)]
    rate = max(rates) * 1e9
    stored = 2 if lora and row.has("mp") else 4  # bytes of a weight: masters are fp32
    pass_bytes = 2 * stored * n_multiplied(c) + (0 if lora else 4 * n_trained(lora, c))
    update_bytes = ADAMW_BYTES * n_trained(lora, c)
    windows = [samples[first : first + row.window] for first in range(0, len(samples), row.window)]
    passes = windows if row.has("packed") else [[length] for length in samples]
    work = [sum(flops(length, lora, c) for length in each) for each in passes]
    seconds = sum(max(each / rate, pass_bytes / bandwidth) for each in work) + len(windows) * update_bytes / bandwidth
    return {
        "flops": sum(work),
        "gflop_s": rate / 1e9,
        "bytes": len(passes) * pass_bytes + len(windows) * update_bytes,
        "bandwidth_gb_s": bandwidth_gb_s,
        "seconds": seconds,
        "tokens_per_s": sum(positions + 1 for positions, _ in samples) / seconds,
    }


def kind(row: Row) -> str:
    """The kind of a row's products: their number of rows, and which of them are computed."""
    return f"{'packed' if row.has('packed') else 'apart'} {'lora' if row.has('lora') else 'full'}"


def fastest(function: Callable[..., object], *arguments: Tensor) -> float:
    """The least seconds that a function takes."""
    return min(repeat(partial(function, *arguments), number=1, repeat=ROUNDS))


def measured_rates(dtype: torch.dtype, positions: int, targets: int) -> Rates:
    """The rates of all linear layers and the head, for these numbers of rows, with and without weight gradients."""
    layers = [(n, positions, n_in, n_out) for (n_in, n_out), n in linear_layers(SIZES).items()]
    work, of_weights, others = 0.0, 0.0, 0.0
    for n, rows, n_in, n_out in [*layers, (1, targets, SIZES.dim, SIZES.vocab_size)]:
        x, weight, gradient = (torch.randn(shape).to(dtype) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
        work += n * 2 * rows * n_in * n_out / 1e9
        others += n * (fastest(F.linear, x, weight) + fastest(torch.mm, gradient, weight))
        of_weights += n * fastest(torch.mm, gradient.T, x)
    return {"full": 3 * work / (others + of_weights), "lora": 2 * work / others}


def measured_bandwidth() -> float:
    """GB/s of y += x on tensors larger than any cache: written lines were read before, as in AdamW."""
    x, y = torch.ones(2**26), torch.ones(2**26)
    return 3 * x.nbytes / fastest(y.add_, x) / 1e9


def measured(args: Namespace) -> dict[str, Any]:
    """The machine's rates and bandwidth."""
    positions, targets = (mean(each) for each in zip(*lengths(args.samples), strict=True))
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_16bit_products(torch.bfloat16) else {})
    rates = {
        f"{name} {layout} {which}": rate
        for name, dtype in dtypes.items()
        for layout, n in (("apart", 1), ("packed", WINDOW))
        for which, rate in measured_rates(dtype, round(n * positions), round(n * targets)).items()
    }
    return {"gflop_s": rates, "bandwidth_gb_s": measured_bandwidth()}


if __name__ == "__main__":
    args = workload.arguments()
    use_training_kernels(torch.device("cpu"))  # a limit is what the faster library can do
    workload.tell(args, measured(args))
