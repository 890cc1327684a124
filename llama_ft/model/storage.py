"""How a model's weights are stored."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Storage(Protocol):
    """A way to store weights. The model is built on the meta device, prepared, materialised, and then filled."""

    def prepare(self, model: nn.Module) -> None:
        """Change a model on the meta device so that its weights are stored in this way."""
        ...

    def write(self, weight: Tensor, first: int, rows: Tensor) -> None:
        """Fill a weight's rows from the first on. Those of one weight come in their order.

        Args:
            rows: floating-point [n, ...], of any dtype and on the CPU.
        """
        ...


@dataclass(frozen=True)
class Dense:
    """Each weight as a plain tensor of one dtype."""

    dtype: torch.dtype

    def prepare(self, model: nn.Module) -> None:
        """Convert every parameter."""
        model.to(self.dtype)

    def write(self, weight: Tensor, first: int, rows: Tensor) -> None:
        """Round to the weight's dtype."""
        weight[first : first + len(rows)].copy_(rows)
