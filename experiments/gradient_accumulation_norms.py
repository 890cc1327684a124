"""What the norms in a network make of micro-batches, for `experiments.gradient_accumulation`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from experiments.gradient_accumulation import N_NORM, NORMS
from llama_ft.model.transformer import RMSNorm


def norms(sizes: Sequence[int]) -> dict[str, list[float]]:
    """Relative error of the gradient of all samples in micro-batches of these sizes, by the norm in the network."""
    made: dict[str, Callable[[], nn.Module]] = {
        "BatchNorm": lambda: nn.BatchNorm1d(16),
        "LayerNorm": lambda: nn.LayerNorm(16),
        "RMSNorm": lambda: RMSNorm(16, 1e-5),
    }
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N_NORM, width, generator=generator, dtype=torch.float64) for width in (8, 1))
    found = {}
    for name in NORMS:
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(8, 16), made[name](), nn.Tanh(), nn.Linear(16, 1)).double()
        whole = accumulated(network, x, y, len(x))
        found[name] = [((accumulated(network, x, y, size) - whole).norm() / whole.norm()).item() for size in sizes]
    return found


def statistics(sizes: Sequence[int]) -> dict[str, list[float]]:
    """How far BatchNorm's statistics of micro-batches of these sizes are from those of all samples, root mean square.

    `mean` in standard deviations, `variance` relative to that of all.
    """
    x = torch.randn(N_NORM, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = torch.nn.BatchNorm1d(16, momentum=1.0, dtype=torch.float64)  # keeps the last micro-batch's statistics

    def apart(size: int, buffer: str, whole: Tensor, unit: Tensor) -> float:
        found = []
        for rows in x.split(size):
            norm(rows)
            found.append((norm.get_buffer(buffer) - whole) / unit)
        return torch.stack(found).square().mean().sqrt().item()

    variance = x.var(0)
    return {
        "mean": [apart(size, "running_mean", x.mean(0), variance.sqrt()) for size in sizes],
        "variance": [apart(size, "running_var", variance, variance) for size in sizes],
    }


def accumulated(network: nn.Module, x: Tensor, y: Tensor, size: int) -> Tensor:
    """The gradient of the mean squared error over all samples, summed over micro-batches of a size."""
    network.zero_grad()
    for rows, targets in zip(x.split(size), y.split(size), strict=True):
        ((network(rows) - targets).square().sum() / len(x)).backward()
    return gradient_of(network)


def gradient_of(network: nn.Module) -> Tensor:
    """The gradient of all parameters, flat."""
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])
