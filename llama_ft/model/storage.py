"""How a model's weights are stored."""

from dataclasses import dataclass
from typing import Protocol

import torch

from llama_ft.model.stored import Weight
from llama_ft.model.transformer import Transformer


class Storage(Protocol):
    """A way to store weights. The model is built on the meta device, prepared, materialised, and then filled."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantized."""
        ...

    @property
    def name(self) -> str:
        """For people."""
        ...

    def prepare(self, model: Transformer) -> None:
        """Change a model on the meta device so that its weights are stored in this way."""
        ...

    def load(self, model: Transformer, name: str, weight: Weight) -> None:
        """Fill a parameter, by its name, from pieces that are on any device and of any floating-point dtype."""
        ...


@dataclass(frozen=True)
class Dense:
    """Each weight as a plain tensor of one dtype."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """As PyTorch calls it."""
        return str(self.dtype).removeprefix("torch.")

    def prepare(self, model: Transformer) -> None:
        """Convert every parameter."""
        model.to(self.dtype)

    @torch.no_grad()
    def load(self, model: Transformer, name: str, weight: Weight) -> None:
        """Round to the parameter's dtype."""
        target = model.get_parameter(name)
        for first, rows in weight.pieces(1):
            target[first : first + len(rows)].copy_(rows)
