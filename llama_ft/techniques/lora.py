"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen weight W plus a trainable product, W + (alpha / rank) B A.

After the official implementation (loralib): a subclass of `nn.Linear` that keeps the key `weight`, A Kaiming-uniform,
B zero, so that a fresh adapter changes nothing.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ft.config import UserError
from llama_ft.model.transformer import at_least_fp32


def lora_scale(rank: int, alpha: float, rslora: bool) -> float:
    """What the update is multiplied by: alpha / rank, or with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) / sqrt."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoRALinear(nn.Linear):
    """A linear layer that takes over another's weight and adds a low-rank update to it."""

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float, dtype: torch.dtype, rslora: bool = False
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and fill a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = lora_scale(rank, alpha, rslora)
        self.dropout = nn.Dropout(dropout)
        self.merged = False
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        return y + F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B) * self.scale

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight, so that the forward pass costs no more than the base's."""
        if not self.merged:
            self.weight.copy_(self.weight + self._update())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of the weight again; exact up to rounding."""
        if self.merged:
            self.weight.copy_(self.weight - self._update())
            self.merged = False

    def _update(self) -> Tensor:
        """What the factors add to the weight, in fp32, so that a 16-bit weight is rounded once, after the sum."""
        return at_least_fp32(self.lora_B) @ at_least_fp32(self.lora_A) * self.scale


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    dtype: torch.dtype = torch.float32,
    rslora: bool = False,
) -> None:
    """Freeze the model and replace, in place, each linear layer whose own name is in `targets`.

    Args:
        targets: last parts of module names, such as `wq`; `dtype` is that of A and B.

    Raises:
        UserError: if a target names no linear layer.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = {name.rpartition(".")[2] for name, _ in linears}
    if unknown := sorted(set(targets) - names):
        raise UserError(f"lora.targets: no linear layer is named {', '.join(unknown)}; there are {sorted(names)}")
    model.requires_grad_(False)
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        if child in targets:
            setattr(model.get_submodule(parent), child, LoRALinear(linear, rank, alpha, dropout, dtype, rslora))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
