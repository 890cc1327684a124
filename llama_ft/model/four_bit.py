"""Frozen weights of linear layers in 4 bits, after QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

Each block of 64 weights has a scale, its largest magnitude, and each weight is one of 16 levels times the scale. NF4's
levels are quantiles of a normal distribution, FP4's are floating-point numbers. Double quantization stores the scales,
less their mean, as 8-bit numbers in blocks of 256. The kernels and formats are bitsandbytes'.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llama_ft.bitsandbytes import bitsandbytes
from llama_ft.model.formats import is_rotated, permute_rotary
from llama_ft.model.sharded import write_rows
from llama_ft.model.storage import Storage
from llama_ft.model.stored import Weight
from llama_ft.model.transformer import OUTPUT, Transformer

BLOCK, SCALES_BLOCK = 64, 256  # weights that share a scale, scales that share one
FEW_ROWS = 8  # up to this many rows of input, as in generation, a kernel multiplies without a dense weight
STORED = ("weight", "scales", "scale_levels", "scale_scales", "mean_scale")  # the tensors that store a weight


@dataclass(frozen=True)
class FourBit(Storage):
    """Linear layers in 4 bits; embedding, norms, biases and head in `dtype`, as in the paper."""

    levels: str = "nf4"  # or fp4
    double_quantization: bool = True

    @property
    def name(self) -> str:
        """The levels' name."""
        return self.levels

    def prepare(self, model: Transformer) -> None:
        """Convert every parameter and replace the linear layers; a UserError if bitsandbytes is missing."""
        bitsandbytes(f"storing weights in 4 bits ({self.levels})")
        super().prepare(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and f"{name}.weight" != OUTPUT:
                n_heads = layer.out_features // model.config.head_dim if is_rotated(f"{name}.weight") else None
                model.set_submodule(name, FourBitLinear(layer, self.levels, self.double_quantization, n_heads))

    def load(self, model: Transformer, name: str, weight: Weight) -> None:
        """Fill a parameter, quantizing one piece at a time."""
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, FourBitLinear) and name.endswith(".weight"):
            layer.quantize(weight)
        else:
            super().load(model, name, weight)


class FourBitLinear(nn.Linear):
    """A linear layer whose frozen weight is in 4 bits. Each product makes a temporary dense copy of it."""

    def __init__(self, base: nn.Linear, levels: str, double_quantization: bool, n_heads: int | None = None) -> None:
        """Take the place of a layer on the meta device.

        Args:
            n_heads: of wq and wk only. A block of scales is smaller than a head, so these are quantized in Hugging
                Face's order of rows to equal the weights that others train adapters on.
        """
        nn.Module.__init__(self)
        self.n_heads = n_heads
        self.in_features, self.out_features, self.levels = base.in_features, base.out_features, levels
        self.dtype = base.weight.dtype  # of the weight once an adapter has been merged into it
        self.bias = base.bias
        n_weights = self.in_features * self.out_features
        n_scales = -(-n_weights // BLOCK)
        self.weight = _frozen(torch.empty(-(-n_weights // 2), dtype=torch.uint8, device="meta"))
        self.scales = _frozen(torch.empty(n_scales, dtype=torch.float32, device="meta"))
        if double_quantization:
            self.scales = _frozen(torch.empty(n_scales, dtype=torch.uint8, device="meta"))
            self.scale_levels = _frozen(torch.empty(256, device="meta"))
            self.scale_scales = _frozen(torch.empty(-(-n_scales // SCALES_BLOCK), device="meta"))
            self.mean_scale = _frozen(torch.empty(1, device="meta"))

    @torch.no_grad()
    def quantize(self, weight: Weight) -> None:
        """Read a weight, [out_features, in_features], from pieces on any device, of any floating-point dtype."""
        scales = []
        for first, rows in weight.pieces(BLOCK // math.gcd(BLOCK, self.in_features)):  # whole blocks
            rows = rows.to(self.weight.device, torch.float32 if rows.dtype == torch.float64 else rows.dtype)
            packed, new = torch.ops.bitsandbytes.quantize_4bit(rows.contiguous(), BLOCK, self.levels, torch.uint8)
            write_rows(self.weight, first * self.in_features // 2, packed.flatten())
            scales.append(new)
        whole = torch.cat(scales)
        if self.scales.dtype == torch.uint8:
            whole = self._reordered(whole, to_hf=True)
            levels, mean = bitsandbytes("").functional.create_dynamic_map().to(whole.device), whole.mean()
            whole, scale_scales = torch.ops.bitsandbytes.quantize_blockwise(whole - mean, levels, SCALES_BLOCK)
            write_rows(self.mean_scale, 0, mean[None])
            write_rows(self.scale_levels, 0, levels)
            write_rows(self.scale_scales, 0, scale_scales)
        write_rows(self.scales, 0, whole)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move like any module; a change of dtype applies to the bias and to a merged weight, not to the scales."""
        scales = {name: self._parameters.pop(name) for name in STORED[1:] if name in self._parameters}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in scales.items():
            assert scale is not None
            self.register_parameter(name, _frozen(fn(scale.detach().view(torch.uint8)).view(scale.dtype)))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out_features, in_features]."""
        if self.weight.dtype != torch.uint8:
            return self.weight.to(dtype)
        dequantize, shape = torch.ops.bitsandbytes.dequantize_4bit, (self.out_features, self.in_features)
        return dequantize(self.weight, self._scales(), BLOCK, self.levels, shape, dtype)  # type: ignore[no-any-return]

    def _scales(self) -> Tensor:
        """The scales in fp32, in the order of the weight's rows."""
        if self.scales.dtype != torch.uint8:
            return self.scales
        stored = self.scales, self.scale_scales, self.scale_levels
        scales = torch.ops.bitsandbytes.dequantize_blockwise(*stored, SCALES_BLOCK, torch.float32)
        return self._reordered(scales.add_(self.mean_scale), to_hf=False)

    def _reordered(self, scales: Tensor, to_hf: bool) -> Tensor:
        if self.n_heads is None or self.in_features % BLOCK:  # then blocks span rows
            return scales
        return permute_rotary(scales.view(self.out_features, -1), self.n_heads, to_hf).flatten()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        has_kernel = self.weight.dtype == torch.uint8 and self.in_features % BLOCK == 0
        if torch.is_grad_enabled() or x.numel() > FEW_ROWS * self.in_features or not has_kernel:
            return FrozenProduct.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]
        stored = self.weight.view(-1, 1), (self.out_features, self.in_features), self._scales(), BLOCK, self.levels
        return torch.ops.bitsandbytes.gemm_4bit(x, *stored, self.bias)  # type: ignore[no-any-return]


class FrozenProduct(torch.autograd.Function):
    """x W^T + b for frozen W and b; the backward pass makes W dense again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FourBitLinear) -> Tensor:
        """Keep only the layer."""
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of x."""
        return gradient @ ctx.layer.dense_weight(gradient.dtype), None


def is_in_4_bits(model: nn.Module) -> bool:
    """Return True if a layer's weight is in 4 bits, or was before an adapter was merged into it."""
    return any(isinstance(module, FourBitLinear) for module in model.modules())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the trainable and all parameters; 4-bit weights count singly, and their scales do not count."""
    n_trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    n_total = sum(each.numel() for each in model.parameters())
    for layer in model.modules():
        if isinstance(layer, FourBitLinear):
            stored = [each for name, each in layer.named_parameters(recurse=False) if name in STORED]
            n_total += layer.in_features * layer.out_features - sum(each.numel() for each in stored)
    return n_trainable, n_total


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
