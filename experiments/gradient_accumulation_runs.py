"""The measurements of `experiments.gradient_accumulation`.

Gradients are those that the library's own step applies: with SGD at a learning rate of 1 and no clipping, the change of
the weights is the negative gradient. In fp64, so that rounding hides nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from experiments.shared import alpaca_samples, gradient_of, largest_error, load_tiny, relative_error
from experiments.study import Log
from llama_ft.data.collate import collate
from llama_ft.data.records import Sample
from llama_ft.model.transformer import RMSNorm, Transformer
from llama_ft.techniques.gradient_accumulation import target_tokens, windows
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.step import TrainStep

SAMPLES, MICRO_BATCHES = 32, 4  # of the linear model
WINDOW = 8  # micro-batches of one sample, as in the course
N_NORM = 64  # samples of the networks with norms
NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(16),
    "LayerNorm": lambda: nn.LayerNorm(16),
    "RMSNorm": lambda: RMSNorm(16, 1e-5),
}


@dataclass(frozen=True)
class Rows:
    """A micro-batch of the linear model, counted like the library's batches."""

    x: Tensor
    y: Tensor

    @property
    def n_targets(self) -> int:
        """The number of samples."""
        return len(self.x)


def linear_model() -> dict[str, float]:
    """The MSE's gradient over 32 samples at once, and over 4 micro-batches, divided by the window's count or not."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(SAMPLES, width, generator=generator, dtype=torch.float64) for width in (5, 1))
    model = nn.Linear(5, 1, dtype=torch.float64)

    def gradient(losses: Sequence[Tensor]) -> Tensor:
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return gradient_of(model)

    batches = [Rows(*rows) for rows in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True)]
    (window,) = windows(batches, MICRO_BATCHES)
    whole = gradient([nn.functional.mse_loss(model(x), y)])
    divided = gradient([(model(rows.x) - rows.y).square().sum() / target_tokens(window) for rows in window])
    not_divided = gradient([nn.functional.mse_loss(model(rows.x), rows.y) for rows in batches])
    return {
        "divided_error": largest_error(divided, whole),
        "not_divided_times": (not_divided.norm() / whole.norm()).item(),
        "not_divided_error": largest_error(not_divided, MICRO_BATCHES * whole),
    }


def applied_gradient(model: Transformer, window: Sequence[Sequence[Sample]]) -> Tensor:
    """The gradient that one step of the library applies for a window of micro-batches; restores the weights."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=1.0), Precision("cpu"), max_grad_norm=inf)
    step([collate(samples) for samples in window])
    with torch.no_grad():
        gradient = torch.cat([(b - p).flatten() for b, p in zip(before, model.parameters(), strict=True)])
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    return gradient


def language_model(n_windows: int, log: Log) -> dict[str, list[float]]:
    """Gradients of the tiny model: of a window of ragged samples at once, one by one, and as a mean of means."""
    model = load_tiny().double()
    exact, biased = [], []
    for number, window in enumerate(windows(alpaca_samples()[: n_windows * WINDOW], WINDOW), start=1):
        log(f"window {number} of {n_windows}")
        whole = applied_gradient(model, [window])
        exact.append(largest_error(applied_gradient(model, [[sample] for sample in window]), whole))
        means = torch.stack([applied_gradient(model, [[sample]]) for sample in window]).mean(0)
        biased.append(relative_error(means, whole))
    return {"micro_batch_error": exact, "mean_of_means_error": biased}


def norms(sizes: Sequence[int]) -> dict[str, list[float]]:
    """The relative error of the gradient over micro-batches of these sizes, by the norm in the network."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N_NORM, width, generator=generator, dtype=torch.float64) for width in (8, 1))
    errors = {}
    for name, make in NORMS.items():
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(8, 16), make(), nn.Tanh(), nn.Linear(16, 1)).double()
        whole = accumulated(network, x, y, len(x))
        errors[name] = [relative_error(accumulated(network, x, y, size), whole) for size in sizes]
    return errors


def accumulated(network: nn.Module, x: Tensor, y: Tensor, size: int) -> Tensor:
    """The gradient of the mean squared error over all samples, summed over micro-batches of a size."""
    network.zero_grad()
    for rows, targets in zip(x.split(size), y.split(size), strict=True):
        ((network(rows) - targets).square().sum() / len(x)).backward()
    return gradient_of(network)


def statistics(sizes: Sequence[int]) -> dict[str, list[float]]:
    """The root mean square distance of BatchNorm's statistics in micro-batches from those of all samples, by size.

    `mean` is in standard deviations, `variance` relative to that of all samples.
    """
    x = torch.randn(N_NORM, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = nn.BatchNorm1d(16, momentum=1.0, dtype=torch.float64)  # keeps the last micro-batch's statistics

    def distance(size: int, buffer: str, whole: Tensor, unit: Tensor) -> float:
        distances = []
        for rows in x.split(size):
            norm(rows)
            distances.append((norm.get_buffer(buffer) - whole) / unit)
        return torch.stack(distances).square().mean().sqrt().item()

    variance = x.var(0)
    return {
        "mean": [distance(size, "running_mean", x.mean(0), variance.sqrt()) for size in sizes],
        "variance": [distance(size, "running_var", variance, variance) for size in sizes],
    }
