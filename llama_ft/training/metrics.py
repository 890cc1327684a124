"""A run's numbers, read one step late so that reading them does not make the device wait."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llama_ft.config.checks import Diverged
from llama_ft.device import memory_in_use_mib
from llama_ft.records.metrics import StepMetrics
from llama_ft.training.loop import StepOutput


def check_losses(before: float, after: float, vocab_size: int) -> None:
    """Raise a Diverged if the last steps made weights that overflow: the loss is no number, or has come to guessing's.

    Activations whose squares are infinite are normed to 0, so that every token is equally probable.
    """
    guessing = math.log(vocab_size)
    has_come_to_guess = math.isclose(after, guessing, rel_tol=1e-6) and not math.isclose(before, guessing, rel_tol=1e-6)
    if not math.isfinite(after) or has_come_to_guess:
        why = "what a model without activations has" if has_come_to_guess else "no number"
        raise Diverged(f"the loss after training is {after:.4f}, {why}: its weights overflow; lower training.lr")


class StepMeter:
    """Reads each step's loss when the next step has been started, and the device has long computed it.

    A gradient that is not finite ends the training, or with `may_skip`, as under loss scaling, skips its step. A
    resumed run goes on from its `last` step.
    """

    def __init__(
        self, total_steps: int, device: torch.device, may_skip: bool = False, last: StepMetrics | None = None
    ) -> None:
        self._total_steps, self._device, self._may_skip = total_steps, device, may_skip
        self._step = last.step if last else 0
        self._tokens, self._seconds = (last.tokens, last.time_s) if last else (0, 0.0)
        self._had_gradient = last is not None and (last.grad_norm or 0) > 0
        self._pending: tuple[StepMetrics, int, Tensor, Moment] | None = None
        self._moment: Callable[[], Moment] = partial(GpuMoment, device) if device.type == "cuda" else Moment
        # One for the step that is read and one for the step that runs; made here, since making them takes time.
        self._pinned = [torch.empty(2, pin_memory=True) for _ in range(2)] if device.type == "cuda" else []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count time from now on: what went before was no training."""
        self._before = self._moment()

    def record(self, output: StepOutput) -> StepMetrics | None:
        """Keep a step's output; returns the step before it, as `flush` does."""
        scalars = torch.stack((output.loss, output.grad_norm.to(output.loss.dtype)))
        if self._pinned:  # copied without waiting; the moment comes after the copy
            scalars = self._pinned[self._step % 2].copy_(scalars, non_blocking=True)
        done = self._moment()
        before = self.flush()
        self._step += 1
        self._tokens += output.n_tokens
        metrics = StepMetrics(
            step=self._step,
            total_steps=self._total_steps,
            loss=math.nan,
            grad_norm=None,
            lr=output.lr,
            tokens=self._tokens,
            tokens_per_s=math.nan,
            memory_mib=round(memory_in_use_mib(self._device), 1),
            time_s=math.nan,
        )
        self._pending = metrics, output.n_tokens, scalars, done
        return before

    def flush(self) -> StepMetrics | None:
        """The newest step, if it has not been read yet; a Diverged if its loss or its gradient is not finite. Waits."""
        if self._pending is None:
            return None
        metrics, n_tokens, scalars, done = self._pending
        self._pending = None
        seconds = done.seconds_after(self._before)
        self._before = done
        self._seconds += seconds
        loss, grad_norm = scalars.tolist()
        is_finite = math.isfinite(grad_norm)
        wrong = f"the loss of optimizer step {metrics.step} is {loss}" if not math.isfinite(loss) else ""
        # A gradient that vanishes where there is something to learn: infinite squares of activations are normed to 0.
        vanished = grad_norm == 0 < loss and self._had_gradient
        self._had_gradient |= grad_norm > 0
        if not wrong and (vanished or (not is_finite and not self._may_skip)):
            wrong = f"the gradient's norm at optimizer step {metrics.step} is {grad_norm}"
        if wrong:
            other = ", or use bf16 instead of fp16" if self._may_skip else ""
            raise Diverged(f"{wrong}: training stopped; lower training.lr{other}")
        return replace(
            metrics,
            loss=loss,
            grad_norm=grad_norm if is_finite else None,
            tokens_per_s=round(n_tokens / seconds, 1),
            time_s=round(self._seconds, 4),
        )


class Moment:
    """When the work given to the CPU so far was done: now, since nothing is given to it without being waited for."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def seconds_after(self, earlier: "Moment") -> float:
        """Between the two."""
        return self._time - earlier._time


class GpuMoment(Moment):
    """When the GPU has done all that it was given so far: an event in its stream, with the GPU's own time."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))  # not of PyTorch's current GPU, which may be another

    def seconds_after(self, earlier: Moment) -> float:
        """Between the two; waits for this one."""
        assert isinstance(earlier, GpuMoment)
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000
