"""The optimizers: AdamW, with moments in 32 or 8 bits, and SGD."""

import inspect
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from llama_ft.bitsandbytes import bitsandbytes
from llama_ft.config import Optimizer, TrainingConfig
from llama_ft.model.sharded import is_split

# As in bitsandbytes: the least elements of a weight for 8-bit moments, elements per scale, the least elements for
# paging.
MIN_8BIT, BLOCK, MIN_PAGED = 4096, 256, 100_000
MOMENTS = "exp_avg", "exp_avg_sq"


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    A step skips the check for CUDA graph capture, which is never active here: in PyTorch 2.13 the check creates a GPU
    context even if all parameters are on the CPU.
    """

    def _accelerator_graph_capture_health_check(self) -> None:
        return

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check  # before 2.13


class SGD(torch.optim.SGD):
    """PyTorch's stochastic gradient descent (Robbins and Monro 1951, doi 10.1214/aoms/1177729586) with momentum.

    Momentum (Polyak 1964, doi 10.1016/0041-5553(64)90137-5) is PyTorch's form of Sutskever et al. 2013: b = momentum b
    + g, and the weight is reduced by lr b. The buffer starts at 0, so the first step makes b = g, as in PyTorch, which
    would leave the buffer unset if the fused kernel skipped the first step, as under loss scaling.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        return super()._init_group(group, *lists)  # type: ignore[no-untyped-call]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments stored in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861, section 2).

    Bitwise equal to `bitsandbytes.optim.AdamW8bit`, whose kernels it uses, but without waiting for the device after
    each weight. A weight's state is only tensors, all initially 0: `step`, an fp32 scalar on the CPU; `exp_avg` and
    `exp_avg_sq`, uint8 in the weight's shape, with `absmax` and `absmax_sq`, fp32 [blocks]. Weights of fewer than 4096
    elements have fp32 moments and no scales.

    With paging (Dettmers et al. 2023, arXiv 2305.14314, section 3), larger moments are in memory that CUDA's driver
    moves to the host when the card is full, outside PyTorch's allocator. In a plan, on fake tensors, they have no
    memory. A UserError if bitsandbytes is not installed.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, is_paged: bool = False
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay})
        name = "paged_adamw_8bit" if is_paged else "adamw_8bit"
        self._kernels = bitsandbytes(f"training.optimizer={name}").functional
        self._is_paged, self._maps = is_paged, list[Tensor]()

    _step_supports_amp_scaling = True  # tells GradScaler that `step` itself skips steps that overflowed

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient, in fp32 or 16 bit, on the CPU or CUDA, one after the other.

        Under loss scaling it waits for the device to know if a gradient overflowed; if so, it only creates the state.
        """
        updated = [(each, group) for group in self.param_groups for each in group["params"] if each.grad is not None]
        for parameter, _ in updated:
            if not self.state[parameter]:
                self.state[parameter] |= self._begin(parameter)
        found_inf = getattr(self, "found_inf", None)
        if type(found_inf) is Tensor and found_inf.item():  # a plan's fake tensor has no value
            return
        for parameter, group in updated:
            self._update(parameter, parameter.grad.contiguous(), group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        count = state["step"].add_(1)
        step = int(count) if type(count) is Tensor else 1  # a plan's fake tensor has no value
        moments = state["exp_avg"], state["exp_avg_sq"]
        (beta1, beta2), eps, lr, decay = group["betas"], group["eps"], group["lr"], group["weight_decay"]
        weight = "adam", gradient, parameter
        if "absmax" in state:
            if parameter.device.type == "cuda" and getattr(moments[0], "is_paged", False):
                for moment in moments:  # all at once, not page by page as the kernel touches them
                    self._kernels.prefetch_tensor(moment)
            scales = *self._maps, state["absmax"], state["absmax_sq"]
            unused = 0.0, 0.0  # other optimizers' beta3 and alpha
            self._kernels.optimizer_update_8bit_blockwise(
                *weight, *moments, beta1, beta2, *unused, eps, step, lr, *scales, decay
            )
        else:
            self._kernels.optimizer_update_32bit(
                *weight, moments[0], beta1, eps, step, lr, moments[1], beta2, weight_decay=decay
            )

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        n, device = parameter.numel(), parameter.device
        state = {"step": torch.zeros(())}  # on the CPU, so that reading it does not wait
        if n < MIN_8BIT:
            return state | {name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS}
        if not self._maps:  # from 8 bits to numbers in [-1, 1], or in [0, 1]
            with no_dispatch():  # fake tensors could not be read
                maps = [self._kernels.create_dynamic_map(is_signed).tolist() for is_signed in (True, False)]
            self._maps = [torch.tensor(values, device=device) for values in maps]
        state |= {name: self._zeros(parameter) for name in MOMENTS}
        return state | {name: torch.zeros(-(-n // BLOCK), device=device) for name in ("absmax", "absmax_sq")}

    def _zeros(self, parameter: Tensor) -> Tensor:
        """uint8 zeros in the parameter's shape, in paged memory if so configured."""
        if not self._is_paged or parameter.numel() < MIN_PAGED:
            return torch.zeros_like(parameter, dtype=torch.uint8)
        if parameter.device.type == "cpu":  # a plan's fake tensor
            zeros = torch.zeros_like(parameter, dtype=torch.uint8, device="meta")
            zeros.is_paged = True  # type: ignore[attr-defined]
            return zeros
        paged: Tensor = self._kernels.get_paged(*parameter.shape, dtype=torch.uint8, device=parameter.device)
        self._kernels.fill(paged, 0)
        return paged


# Remove the wrappers that exclude these from PyTorch's compiler: they import it, which costs seconds at each start.
WRAPPED = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
for _class, _name in product((AdamW, AdamW8bit, SGD), WRAPPED):
    setattr(_class, _name, torch.no_grad()(inspect.unwrap(getattr(_class, _name))))


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the config names, over the trainable parameters.

    Fused, on the CPU too: PyTorch's default form holds one more copy of all parameters during a step. SGD updates
    16-bit weights one by one instead: PyTorch's fused CPU kernel leaves most of such a weight unchanged
    (pytorch/pytorch#191763, in 2.13 too). For weights split over processes SGD has no fused kernel.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    decay = config.weight_decay
    if config.optimizer is Optimizer.adamw:
        return AdamW(trainable, config.lr, weight_decay=decay, fused=True)
    if config.optimizer is not Optimizer.sgd:
        return AdamW8bit(trainable, config.lr, decay, is_paged=config.optimizer is Optimizer.paged_adamw_8bit)
    is_fused = all(parameter.dtype.itemsize > 2 and not is_split(parameter) for parameter in trainable)
    return SGD(trainable, config.lr, config.momentum, weight_decay=decay, fused=is_fused, foreach=False)
