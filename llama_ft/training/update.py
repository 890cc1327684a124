"""What a step does with its gradients: all weights are updated after the backward pass, or each within it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from llama_ft.model.sharded import whole


class Update:
    """After the backward pass: the gradients are clipped to a norm over all of them, then the weights are updated."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_grad_norm: float) -> None:
        self.optimizer, self.scaler, self.max_grad_norm = optimizer, scaler, max_grad_norm

    def in_backward(self) -> AbstractContextManager[None]:
        """Context for the backward passes of a step."""
        return nullcontext()

    def __call__(self) -> Tensor:
        """Update the weights and free the gradients; returns the gradients' norm before clipping, a scalar."""
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        self.scaler.step(self.optimizer)
        vars(self.optimizer).pop("grad_scale", None)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _clip(self) -> Tensor:
        """Clip the gradients' norm; returns what it was. A fused optimizer divides by `grad_scale` as it reads them."""
        gradients = [each.grad for each in self.optimizer.param_groups[0]["params"] if each.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)
        if self.optimizer.defaults.get("fused"):
            self.optimizer.grad_scale = scale.float()  # type: ignore[attr-defined]
        else:
            torch._foreach_div_(gradients, scale)
        return norm


class UpdateInBackward(Update):
    """Each weight as soon as its gradient is there, which is then freed: one weight's gradient is alive at a time.

    LOMO (Lv et al. 2023, arXiv 2306.09782, algorithm 1), with any optimizer, as torchtune's `optimizer_in_bwd` has it.
    Nothing is known of the other gradients then, so none is clipped or unscaled; and a step is one backward pass.
    """

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Context for the step's backward pass, in which the weights are updated."""
        parameters = self.optimizer.param_groups[0]["params"]
        self._norms: dict[Tensor, Tensor] = {}
        hooks = [parameter.register_post_accumulate_grad_hook(self._update) for parameter in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self) -> Tensor:
        """Update the weights whose gradients did not come of a backward pass; returns the norm of all gradients."""
        parameters = self.optimizer.param_groups[0]["params"]
        for parameter in parameters:
            if parameter.grad is not None:
                self._update(parameter)
        norms = [self._norms.pop(each) for each in parameters if each in self._norms]  # summed in one order, always
        grad_norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return grad_norm

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        group = self.optimizer.param_groups[0]
        parameters, group["params"] = group["params"], [parameter]  # the optimizer need not look at the others
        self.optimizer.step()
        group["params"], parameter.grad = parameters, None
