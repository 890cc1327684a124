"""One optimizer step: the loss of a window of micro-batches, its gradient and the update."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from llama_ft.data.collate import Batch
from llama_ft.kernels import at_least_fp32
from llama_ft.model.autograd import SummedCrossEntropy
from llama_ft.model.transformer import Transformer
from llama_ft.parallel.ranks import ALONE, Ranks
from llama_ft.parallel.split import replicate, sum_after
from llama_ft.techniques.gradient_accumulation import target_tokens
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.update import Update, UpdateInBackward

Window = Sequence[Batch]  # the micro-batches of one optimizer step


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy, in at least fp32, summed over the batch's target tokens: a scalar."""
    return _summed_loss(_logits(model, batch), batch)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [N, V] at the N target positions."""
    logits: Tensor = model(batch.tokens, mask=batch.segments, logits_at=batch.target_positions)
    return logits


def _summed_loss(logits: Tensor, batch: Batch) -> Tensor:
    loss: Tensor = SummedCrossEntropy.apply(at_least_fp32(logits), batch.targets)  # type: ignore[no-untyped-call]
    return loss


class TrainStep:
    """An optimizer step, called with a window. It never waits for the device."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        max_grad_norm: float = 1.0,
        updates_in_backward: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.ranks = model, ranks
        self.forward = replicate(model, ranks)
        self.optimizer = optimizer
        self.precision = precision
        self.scaler = precision.scaler()
        kind = UpdateInBackward if updates_in_backward else Update
        self.update = kind(optimizer, self.scaler, max_grad_norm)
        self.device = next(model.parameters()).device

    def __call__(self, window: Window) -> tuple[Tensor, Tensor]:
        """Update the weights; return the loss per target token and the norm of the unclipped gradient, both scalars."""
        n_targets = self.ranks.total(target_tokens(window))
        loss = torch.zeros((), device=self.device)
        with self.update.in_backward():
            for number, micro_batch in enumerate(window, 1):
                sum_after(self.forward, number == len(window))
                loss += self._backward(micro_batch, n_targets)
        self.ranks.add_up(loss)
        return loss, self.update()

    def _backward(self, micro_batch: Batch, n_targets: int) -> Tensor:
        """Add a micro-batch's part to the window's gradient; return its part of the loss."""
        with self.precision.autocast():
            loss = summed_loss(self.forward, micro_batch.to(self.device)) / n_targets
        self.scaler.scale(loss).backward()
        return loss.detach()

    def dry_run(self, window: Window) -> None:
        """Do a whole step at learning rate 0, then undo its effects.

        Afterwards kernels are chosen and the optimizer's state is allocated, but weights, moments, step counts, scaler
        and random state are as before the first step. A run that needs too much memory fails here, not hours later.
        """
        scaler = self.scaler.state_dict()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        on_cuda = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_cuda else []):
            self(window)
        if on_cuda:
            torch.cuda.synchronize(self.device)  # the host may write to paged state only while no kernel does
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.scaler.load_state_dict(scaler)


@torch.no_grad()
def evaluate_batch(step: TrainStep, batch: Batch) -> Tensor:
    """The summed loss, and the number of targets that are the most probable token: float64 [2], on the device.

    Computed without dropout, in the run's precision.
    """
    step.model.eval()
    batch = batch.to(step.device)
    with step.precision.autocast():
        logits = _logits(step.model, batch)
        n_correct = (logits.argmax(-1) == batch.targets).sum()
        loss = _summed_loss(logits, batch)
    step.model.train()
    return torch.stack((loss.double(), n_correct.double()))


def evaluate(step: TrainStep, batches: Iterable[Batch]) -> tuple[float, float]:
    """Mean loss per target token, and the share of targets that are the most probable token.

    All processes must have equally many batches.
    """
    total, n_targets = torch.zeros(2, dtype=torch.float64, device=step.device), 0
    for batch in batches:
        total += evaluate_batch(step, batch)
        n_targets += batch.n_targets
    step.ranks.add_up(total)
    loss, accuracy = (total / step.ranks.total(n_targets)).tolist()
    return loss, accuracy
