"""A run's metrics, read one step late so that reading them does not stall the device."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llama_ft.config.checks import Diverged
from llama_ft.device import memory_in_use_mib
from llama_ft.records.metrics import StepMetrics
from llama_ft.training.loop import StepOutput


def check_losses(before: float, after: float, vocab_size: int) -> None:
    """Raise a Diverged if the last steps made the weights overflow: the loss is not finite, or now that of guessing.

    Activations whose squares overflow are normalized to 0, which makes every token equally probable.
    """
    guessing = math.log(vocab_size)
    now_guesses = math.isclose(after, guessing, rel_tol=1e-6) and not math.isclose(before, guessing, rel_tol=1e-6)
    if not math.isfinite(after) or now_guesses:
        why = "the loss of a model whose activations are 0" if now_guesses else "not a number"
        raise Diverged(f"the loss after training is {after:.4f}, {why}: the weights overflow; lower training.lr")


class StepMeter:
    """Reads each step's loss after the next step has been started, when the device has long computed it.

    A gradient that is not finite ends the training; with `may_skip`, as under loss scaling, it only skips the step. A
    resumed run continues after its `last` step.
    """

    def __init__(
        self, total_steps: int, device: torch.device, may_skip: bool = False, last: StepMetrics | None = None
    ) -> None:
        self._total_steps, self._device, self._may_skip = total_steps, device, may_skip
        self._step = last.step if last else 0
        self._tokens, self._seconds = (last.tokens, last.time_s) if last else (0, 0.0)
        self._had_gradient = last is not None and (last.grad_norm or 0) > 0
        self._pending: tuple[float, int, float, Tensor, Moment] | None = None  # of the newest step
        self._moment: Callable[[], Moment] = partial(GpuMoment, device) if device.type == "cuda" else Moment
        # One for the step being read and one for the running step; allocated here, since that is slow.
        self._pinned = [torch.empty(2, pin_memory=True) for _ in range(2)] if device.type == "cuda" else []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count time from now on: the time before was not spent on training."""
        self._before = self._moment()

    def record(self, output: StepOutput) -> StepMetrics | None:
        """Keep a step's output; return the previous step's metrics, as `flush` does."""
        scalars = torch.stack((output.loss, output.grad_norm.to(output.loss.dtype)))
        if self._pinned:  # copied without waiting; the moment comes after the copy
            scalars = self._pinned[self._step % 2].copy_(scalars, non_blocking=True)
        done = self._moment()
        before = self.flush()
        self._step += 1
        self._tokens += output.n_tokens
        self._pending = output.lr, output.n_tokens, memory_in_use_mib(self._device), scalars, done
        return before

    def flush(self) -> StepMetrics | None:
        """Wait for the newest step and return its metrics, if not read yet; a Diverged if a value is not finite."""
        if self._pending is None:
            return None
        lr, n_tokens, memory_mib, scalars, done = self._pending
        self._pending = None
        seconds = done.seconds_after(self._before)
        self._before = done
        self._seconds += seconds
        loss, grad_norm = scalars.tolist()
        is_finite = math.isfinite(grad_norm)
        wrong = f"the loss of optimizer step {self._step} is {loss}" if not math.isfinite(loss) else ""
        # The gradient vanishes although the loss does not: activations whose squares overflow are normalized to 0.
        vanished = grad_norm == 0 < loss and self._had_gradient
        self._had_gradient |= grad_norm > 0
        if not wrong and (vanished or (not is_finite and not self._may_skip)):
            wrong = f"the gradient's norm at optimizer step {self._step} is {grad_norm}"
        if wrong:
            other = ", or use bf16 instead of fp16" if self._may_skip else ""
            raise Diverged(f"{wrong}: training stopped; lower training.lr{other}")
        return StepMetrics(
            step=self._step,
            total_steps=self._total_steps,
            loss=loss,
            grad_norm=grad_norm if is_finite else None,
            lr=lr,
            tokens=self._tokens,
            tokens_per_s=round(n_tokens / seconds, 1),
            memory_mib=round(memory_mib, 1),
            time_s=round(self._seconds, 4),
        )


class Moment:
    """The time at which the CPU finished all work so far: now, since it works synchronously."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def seconds_after(self, earlier: "Moment") -> float:
        """Seconds between the two moments."""
        return self._time - earlier._time


class GpuMoment(Moment):
    """The time at which the GPU finishes all work submitted so far: an event in its stream, on the GPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))  # PyTorch's current GPU may be another

    def seconds_after(self, earlier: Moment) -> float:
        """Seconds between the two moments; waits for this one."""
        assert isinstance(earlier, GpuMoment)
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000
