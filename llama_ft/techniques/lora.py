"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen weight W plus a trainable product, W + (alpha / rank) B A.

As in the official implementation (loralib), a subclass of `nn.Linear` keeps the key `weight`, A starts Kaiming-uniform
and B zero, so that a new adapter changes nothing.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ft.config import LoraConfig, UserError
from llama_ft.kernels import at_least_fp32
from llama_ft.model.four_bit import FourBitLinear
from llama_ft.model.sharded import own, write_rows
from llama_ft.model.transformer import Transformer
from llama_ft.techniques.mixed_precision import Precision


def apply(model: Transformer, config: LoraConfig, precision: Precision) -> None:
    """Freeze the model and adapt the layers that the config names, as `add_lora` does."""
    add_lora(model, config.rank, config.alpha, config.dropout, config.targets, config.rslora, dtype=precision.trainable)


def lora_scale(rank: int, alpha: float, rslora: bool) -> float:
    """The update's factor: alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoRALinear(nn.Linear):
    """A linear layer that shares the weight of a base layer of any class and adds a low-rank update to its output.

    It takes over all attributes of the base layer, so the weight keeps its key and its storage format.
    """

    def __new__(cls, base: nn.Linear | None = None, *_: Any, **__: Any) -> Self:
        """Create an instance of a class that also inherits from the base's; a copy has no base."""
        plain = base is None or type(base) is nn.Linear
        kind: type[Self] = cls if plain else _over(cls, type(base))  # type: ignore[arg-type]
        return super().__new__(kind)

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and fill a second weight
        self.__dict__ |= {key: value.copy() if isinstance(value, dict) else value for key, value in vars(base).items()}
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = lora_scale(rank, alpha, rslora)
        self.dropout = nn.Dropout(dropout)
        self.merged = False
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, dtype=dtype, device=device))
        self.initialize_added()

    def initialize_added(self) -> None:
        """Set A to Kaiming-uniform and B to zero: the layer then computes the same as its base."""
        a = torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype, device=self.lora_A.device)
        write_rows(self.lora_A.detach(), 0, nn.init.kaiming_uniform_(a, a=math.sqrt(5)))
        nn.init.zeros_(own(self.lora_B))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        y = super().forward(x)
        if self.merged:
            return y
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if not torch.is_autocast_enabled(x.device.type):  # autocast would cast them, once per step
            a, b = a.to(x.dtype), b.to(x.dtype)
        return y + F.linear(F.linear(self.dropout(x), a) * self.scale, b)  # scale the small intermediate

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight, so that the forward pass costs no more than the base's."""
        if not self.merged:
            self._set(self._dense() + self._update())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the update from the weight; exact up to rounding."""
        if self.merged:
            self._set(self._dense() - self._update())
            self.merged = False

    def _dense(self) -> Tensor:
        return self.dense_weight(torch.float32) if isinstance(self, FourBitLinear) else self.weight

    def _set(self, weight: Tensor) -> None:
        """Set the weight, rounded to its dtype; a 4-bit weight becomes a plain tensor."""
        if isinstance(self, FourBitLinear):
            self.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        else:
            self.weight.copy_(weight)

    def _update(self) -> Tensor:
        """The update in fp32, so that a 16-bit weight is rounded once, after the sum."""
        return at_least_fp32(self.lora_B) @ at_least_fp32(self.lora_A) * self.scale


@cache
def _over(cls: Any, parent: Any) -> Any:
    return type(f"LoRA{parent.__name__}", (cls, parent), {})


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Sequence[str] = ("wq", "wv"),
    rslora: bool = False,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Freeze the model and replace, in place, each linear layer whose last name is in `targets`.

    Args:
        rank: r, the inner size of the two factors.
        alpha: the update is scaled by alpha / rank, or with `rslora` by alpha / sqrt(rank).
        dropout: share of the adapter's inputs to drop in training.
        targets: last parts of module names, such as `wq`.
        dtype: of A and B.

    Raises:
        UserError: if a value is not allowed, a target names no linear layer, or the model has LoRA layers already.
    """
    LoraConfig(rank, alpha, rslora, dropout, list(targets))  # checks them
    if lora_layers(model):
        raise UserError("the model has LoRA layers already")
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = {name.rpartition(".")[2] for name, _ in linears}
    if unknown := sorted(set(targets) - names):
        raise UserError(f"lora.targets: no linear layer is named {', '.join(unknown)}; the model has {sorted(names)}")
    model.requires_grad_(False)
    for name, linear in linears:
        if name.rpartition(".")[2] in targets:
            model.set_submodule(name, LoRALinear(linear, rank, alpha, dropout, rslora, dtype=dtype))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
