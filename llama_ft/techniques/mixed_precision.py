"""Mixed precision (Micikevicius et al. 2018, arXiv 1710.03740) through PyTorch's AMP.

It makes three separate choices:
- compute: matrix products in 16 bit, under autocast;
- trainable weights: fp32 masters, hence fp32 gradients and optimizer state (`mp.trainable_weights`);
- frozen weights: 16 bit, since weights that are never updated need no master, or 4 bit (`mp.frozen_weights`). In fp32
  they would cost more than without mixed precision: autocast keeps 16-bit copies until the backward pass.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from llama_ft.config import Dtype, MixedPrecisionConfig, TrainConfig, UserError
from llama_ft.kernels import has_16bit_products
from llama_ft.model.four_bit import FourBit
from llama_ft.model.storage import Storage

# oneDNN builds 16-bit kernels for every new length, which costs a quarter of a run's time on ragged data.
CPU_16BIT_PAD_MULTIPLE = 32


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run on a device type; fp32 throughout means mixed precision is off."""

    device_type: str
    compute: torch.dtype = torch.float32
    trainable: torch.dtype = torch.float32
    frozen: Storage = Storage(torch.float32)

    @classmethod
    def of(cls, config: TrainConfig, device_type: str, has_bf16: bool) -> "Precision":
        """The precision of a run; a UserError if the device, or the optimizer on it, does not support it."""
        precision = mixed_precision(config.mp, device_type, has_bf16) if config.optim.mp else cls(device_type)
        config.training.check_on(device_type, config.accumulation_steps, precision.compute == torch.float16)
        return precision

    def autocast(self) -> AbstractContextManager[None]:
        """A context for the forward pass and the loss."""
        return torch.autocast(self.device_type, self.compute, enabled=self.compute != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler against fp16 gradients' underflow; bf16 has fp32's range and needs none."""
        return torch.amp.GradScaler(self.device_type, enabled=self.compute == torch.float16)

    def storage(self, *, frozen: bool) -> Storage:
        """The storage of frozen or of trainable weights."""
        return self.frozen if frozen else Storage(self.trainable)

    @property
    def pad_multiple(self) -> int:
        """Batch lengths are padded to a multiple of this for speed; under a causal mask that changes no result."""
        uses_onednn = self.device_type == "cpu" and self.compute != torch.float32 and has_16bit_products(self.compute)
        return CPU_16BIT_PAD_MULTIPLE if uses_onednn else 1


def mixed_precision(config: MixedPrecisionConfig, device_type: str, has_bf16: bool) -> Precision:
    """The precision of a run with MP; a UserError for bf16 on a device without it, or fp16 without fp32 masters."""
    if config.dtype is Dtype.bf16 and not has_bf16:
        raise UserError("mp.dtype=bf16 is not supported by this GPU: use mp.dtype=fp16 or auto")
    bf16 = config.dtype is Dtype.bf16 or (config.dtype is Dtype.auto and has_bf16)
    if not bf16 and config.trainable_weights is Dtype.compute:
        raise UserError("mp.trainable_weights=compute needs bf16, but this run computes in fp16: use fp32")
    compute = torch.bfloat16 if bf16 else torch.float16
    stored = {Dtype.fp32: torch.float32, Dtype.compute: compute}
    trainable, frozen = stored[config.trainable_weights], config.frozen_weights
    if frozen in stored:
        return Precision(device_type, compute, trainable, Storage(stored[frozen]))
    return Precision(device_type, compute, trainable, FourBit(compute, frozen.name, config.double_quantization))
