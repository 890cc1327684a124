"""`python -m experiments.gradient_accumulation`: when micro-batches give the gradient of the whole batch, and when not.

Gradients are those that the library's own step applies: with SGD at a learning rate of 1 and no clipping, what a step
takes off the weights is the gradient. In fp64, so that equal means equal.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.figure import BLUE, GREEN, ORANGE, drawn
from experiments.study import Claim, Numbers, Options, Study, main, table

if TYPE_CHECKING:
    from torch import Tensor

    from llama_ft.data.dataset import Sample
    from llama_ft.model.transformer import Transformer

EQUAL = 1e-10  # relative, in fp64
MIN_BIAS = 0.05  # of a mean of means, relative to the gradient
SAMPLES, MICRO_BATCHES = 32, 4  # of the linear model
N_NORM = 64  # samples of the networks with norms
NEAR_LAW = 0.25  # relative
NORMS = ("BatchNorm", "LayerNorm", "RMSNorm")
WINDOW = 8  # micro-batches of one sample, as in the course


@dataclass(frozen=True)
class _Rows:
    """A micro-batch of the linear model, which counts as the library's batches do."""

    x: "Tensor"
    y: "Tensor"

    @property
    def n_targets(self) -> int:
        return len(self.x)


def linear_model() -> dict[str, float]:
    """MSE of 32 samples at once, and of 4 micro-batches of 8, divided by the window's count and not divided."""
    import torch

    from experiments.gradient_accumulation_norms import gradient_of
    from llama_ft.techniques.gradient_accumulation import target_tokens, windows

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(SAMPLES, width, generator=generator, dtype=torch.float64) for width in (5, 1))
    model = torch.nn.Linear(5, 1, dtype=torch.float64)

    def gradient(backward: Callable[[], None]) -> "Tensor":
        model.zero_grad()
        backward()
        return gradient_of(model)

    batches = [_Rows(*rows) for rows in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True)]

    def divided() -> None:
        (window,) = windows(batches, MICRO_BATCHES)
        for batch in window:
            ((model(batch.x) - batch.y).square().sum() / target_tokens(window)).backward()

    def not_divided() -> None:
        for batch in batches:
            torch.nn.functional.mse_loss(model(batch.x), batch.y).backward()

    whole = gradient(lambda: torch.nn.functional.mse_loss(model(x), y).backward())
    sums = gradient(not_divided)
    return {
        "divided_error": apart(gradient(divided), whole),
        "not_divided_times": (sums.norm() / whole.norm()).item(),
        "not_divided_error": apart(sums, MICRO_BATCHES * whole),
    }


def apart(found: "Tensor", expected: "Tensor") -> float:
    """The largest difference, relative to the largest expected number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def applied_gradient(model: "Transformer", window: Sequence[Sequence["Sample"]]) -> "Tensor":
    """The gradient that one step of the library applies for a window of micro-batches; the weights are put back."""
    import torch

    from llama_ft.data.collate import collate
    from llama_ft.techniques.mixed_precision import Precision
    from llama_ft.training.step import TrainStep

    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = TrainStep(model, optimizer, Precision("cpu"), max_grad_norm=float("inf"))
    step([collate(samples) for samples in window])
    with torch.no_grad():
        found = torch.cat([(b - p).flatten() for b, p in zip(before, model.parameters(), strict=True)])
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    return found


def language_model(n_windows: int, log: Callable[[str], None]) -> dict[str, Any]:
    """The tiny model: a window of ragged samples at once, one by one, and as a mean of their means."""
    import torch

    from experiments.builtin import alpaca_samples, load_tiny
    from llama_ft.techniques.gradient_accumulation import windows

    model = load_tiny().double()
    exact, biased = [], []
    for number, window in enumerate(windows(alpaca_samples()[: n_windows * WINDOW], WINDOW), start=1):
        log(f"window {number} of {n_windows}")
        whole = applied_gradient(model, [window])
        exact.append(apart(applied_gradient(model, [[sample] for sample in window]), whole))
        means = torch.stack([applied_gradient(model, [[sample]]) for sample in window]).mean(0)
        biased.append(((means - whole).norm() / whole.norm()).item())
    return {"micro_batch_error": exact, "mean_of_means_error": biased}


def claims_of(numbers: Numbers) -> list[Claim]:
    """What the numbers say of each claim."""
    linear, model, sizes = numbers["linear"], numbers["language_model"], numbers["micro_batch_sizes"]
    by_norm, least = numbers["norms"], min(model["mean_of_means_error"])
    batch_norm, (means, variances) = by_norm["BatchNorm"], numbers["statistics"].values()
    by_law = [math.sqrt((N_NORM - size) / ((N_NORM - 1) * size)) for size in sizes]  # drawn without replacement
    other = max(by_norm["LayerNorm"] + by_norm["RMSNorm"])
    times = linear["not_divided_times"]
    return [
        Claim(
            f"linear model, MSE: {MICRO_BATCHES} micro-batches, each loss divided by the window's count, give the"
            " gradient of the whole batch",
            linear["divided_error"] <= EQUAL,
            {"relative error": linear["divided_error"]},
        ),
        Claim(
            f"without the division the gradient is {MICRO_BATCHES} times as large",
            linear["not_divided_error"] <= EQUAL,
            {"times": times, "relative error": linear["not_divided_error"]},
        ),
        Claim(
            "language model, Alpaca's lengths: divided by the window's target tokens, micro-batches give the gradient"
            " of the whole batch",
            max(model["micro_batch_error"]) <= EQUAL,
            {"relative error at most": max(model["micro_batch_error"])},
        ),
        Claim(
            f"a mean of the micro-batches' means is off by {100 * MIN_BIAS:g} percent of the gradient or more",
            least >= MIN_BIAS,
            {"percent at least": 100 * least, "percent at most": 100 * max(model["mean_of_means_error"])},
        ),
        Claim(
            "with BatchNorm micro-batches give another gradient, the more so the smaller they are",
            min(batch_norm) > 1e-3 and batch_norm == sorted(batch_norm, reverse=True),
            {f"percent off by {size}": 100 * error for size, error in zip(sizes, batch_norm, strict=True)},
        ),
        Claim(
            f"for its statistics are others: the mean of a micro-batch of n of {N_NORM} samples is about"
            f" sqrt(({N_NORM} - n) / ({N_NORM - 1} n)) standard deviations from that of all, to {100 * NEAR_LAW:g}"
            " percent of it, and the variance is off too, the more so the smaller n is",
            all(abs(found / law - 1) <= NEAR_LAW for found, law in zip(means, by_law, strict=True))
            and variances == sorted(variances, reverse=True)
            and variances[-1] > EQUAL,
            {f"deviations by {size}": each for size, each in zip(sizes, means, strict=True)}
            | {f"variance off by {sizes[0]}": variances[0]},
        ),
        Claim("with LayerNorm and RMSNorm they give the same", other <= EQUAL, {"relative error at most": other}),
    ]


def draw(numbers: Numbers, file: Path) -> None:
    """The bias of each window, and the norms' errors against the size of a micro-batch."""
    model, sizes = numbers["language_model"], numbers["micro_batch_sizes"]
    titles = ("gradient of 8 ragged samples, one by one", "gradient of 64 samples in micro-batches")
    with drawn(file, titles) as (bias, by_size):
        places = range(1, 1 + len(model["mean_of_means_error"]))
        bias.bar(places, [100 * error for error in model["mean_of_means_error"]], color=ORANGE, label="mean of means")
        exact = [100 * error for error in model["micro_batch_error"]]
        bias.bar(places, exact, color=BLUE, label=f"token-weighted: {max(exact):.0e}")
        bias.set(xlabel="window", ylabel="percent off that of the whole", xticks=list(places))
        bias.set_ylim(top=1.3 * 100 * max(model["mean_of_means_error"]))
        bias.legend(frameon=False, loc="upper right")
        for name, colour, style in zip(NORMS, (ORANGE, BLUE, GREEN), ("o-", "s-", "^--"), strict=True):
            errors = [100 * error for error in numbers["norms"][name]]
            by_size.plot(sizes, errors, style, color=colour, lw=3, ms=9, label=name)
        by_size.set_xscale("log", base=2)
        by_size.set_xticks(list(sizes), [str(size) for size in sizes])
        by_size.set(xlabel="samples in a micro-batch", ylabel="percent off that of the whole")
        by_size.legend(frameon=False)


def measure(options: Options, log: Callable[[str], None]) -> Numbers:
    """Compute all gradients."""
    from experiments.gradient_accumulation_norms import norms, statistics

    sizes = [2, 4, 8, 16, 32]
    return {
        "linear": linear_model(),
        "language_model": language_model(1 if options.quick else 4, log),
        "micro_batch_sizes": sizes,
        "norms": norms(sizes),
        "statistics": statistics(sizes),
    }


def table_of(numbers: Numbers) -> str:
    """The norms' errors by the size of a micro-batch."""
    sizes = numbers["micro_batch_sizes"]
    columns = [*(numbers["norms"][name] for name in NORMS), *numbers["statistics"].values()]
    titles = (
        *(f"{name}, relative error" for name in NORMS),
        "BatchNorm's mean, deviations off",
        "its variance, relative",
    )
    return table(("samples in a micro-batch", *titles), list(zip(sizes, *columns, strict=True)))


STUDY = Study("gradient_accumulation", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    sys.exit(main(STUDY))
