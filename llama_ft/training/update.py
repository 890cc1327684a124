"""Weight updates: of all weights after the backward pass, or of each weight within it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from llama_ft.model.sharded import whole


class Update:
    """Clips the gradients' total norm after the backward pass, then updates the weights."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_grad_norm: float) -> None:
        self.optimizer, self.scaler, self.max_grad_norm = optimizer, scaler, max_grad_norm

    def in_backward(self) -> AbstractContextManager[None]:
        """A context for the backward passes of a step."""
        return nullcontext()

    def __call__(self) -> Tensor:
        """Update the weights and free the gradients; return the gradients' norm before clipping, a scalar."""
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        self.scaler.step(self.optimizer)
        vars(self.optimizer).pop("grad_scale", None)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _clip(self) -> Tensor:
        """Clip the gradients; return their norm before. A fused optimizer divides by `grad_scale` as it reads them."""
        gradients = [each.grad for each in self.optimizer.param_groups[0]["params"] if each.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)
        if self.optimizer.defaults.get("fused"):
            self.optimizer.grad_scale = scale.float()  # type: ignore[attr-defined]
        else:
            torch._foreach_div_(gradients, scale)
        return norm


class UpdateInBackward(Update):
    """Updates each weight as soon as its gradient exists and frees it, so that only one gradient is in memory.

    This is LOMO (Lv et al. 2023, arXiv 2306.09782, algorithm 1) with any optimizer, like torchtune's
    `optimizer_in_bwd`. The other gradients are not known then, so none is clipped or unscaled, and a step is one
    backward pass.
    """

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """A context for the step's backward pass, which updates the weights."""
        parameters = self.optimizer.param_groups[0]["params"]
        self._norms: dict[Tensor, Tensor] = {}
        hooks = [parameter.register_post_accumulate_grad_hook(self._update) for parameter in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self) -> Tensor:
        """Update the weights whose gradients did not come from a backward pass; return the norm of all gradients."""
        parameters = self.optimizer.param_groups[0]["params"]
        for parameter in parameters:
            if parameter.grad is not None:
                self._update(parameter)
        norms = [self._norms.pop(each) for each in parameters if each in self._norms]  # always in the same order
        grad_norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return grad_norm

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        group = self.optimizer.param_groups[0]
        parameters, group["params"] = group["params"], [parameter]  # hide the others from the optimizer
        self.optimizer.step()
        group["params"], parameter.grad = parameters, None
