"""Storage formats of a model's weights."""

from dataclasses import dataclass

import torch

from llama_ft.model.sharded import own_rows, write_rows
from llama_ft.model.stored import Weight
from llama_ft.model.transformer import Transformer


@dataclass(frozen=True)
class Storage:
    """Each weight as a plain tensor of one dtype. The model is prepared, then materialized, then filled."""

    dtype: torch.dtype  # of weights that are not quantized

    @property
    def name(self) -> str:
        """The format's name, for messages."""
        return str(self.dtype).removeprefix("torch.")

    def prepare(self, model: Transformer) -> None:
        """Convert a model on the meta device to this format."""
        model.to(self.dtype)

    @torch.no_grad()
    def load(self, model: Transformer, name: str, weight: Weight) -> None:
        """Fill a parameter, by name, from pieces on any device and of any floating-point dtype."""
        target = model.get_parameter(name)
        for first, rows in weight.pieces(1, own_rows(target)):
            write_rows(target, first, rows)
