"""The run's `metrics.jsonl`: a line per optimizer step, written without making the device wait."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from llama_ft.config import UserError

FLUSH_SECONDS = 0.25


class MetricsFile:
    """Writes a step's line one step late, when the device has long computed its loss."""

    def __init__(self, file: Path, total_steps: int, may_skip: bool, memory_mib: Callable[[], float]) -> None:
        """Go on after the lines that the file holds.

        Args:
            may_skip: whether a gradient that is not finite skips its step, as under loss scaling, or stops the run.
            memory_mib: reads the memory in use now, without waiting for the device.
        """
        self._total_steps = total_steps
        self._file = file.open("a+", encoding="utf-8")
        self._file.seek(0)
        earlier = [json.loads(line) for line in self._file]
        self._may_skip, self._memory_mib = may_skip, memory_mib
        self._pending: tuple[dict[str, Any], Tensor, torch.cuda.Event | None] | None = None
        self._last_step = self._last_flush = time.perf_counter()
        self._seconds: float = earlier[-1]["time_s"] if earlier else 0.0
        self._tokens: int = earlier[-1]["tokens"] if earlier else 0
        self.losses: list[float] = [line["loss"] for line in earlier]
        self.skipped_steps = sum(line["grad_norm"] is None for line in earlier)
        # One for the step that is written and one for the step that runs; made here, since making them takes time.
        self._pinned = [torch.empty(2, pin_memory=True) for _ in range(2)] if torch.cuda.is_available() else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._write_pending()
        self._file.close()

    def flush(self) -> None:
        """Write the newest step's line too, which waits for the device, and bring all lines to the disk.

        Raises:
            UserError: if its loss is not finite.
        """
        self._write_pending()
        self._file.flush()
        os.fsync(self._file.fileno())

    def begin_part(self) -> None:
        """Count time from now on: what went before was no training."""
        self._last_step = time.perf_counter()

    def record(self, loss: Tensor, grad_norm: Tensor, lr: float, tokens: int) -> None:
        """Keep a step's numbers, and write those of the step before.

        Raises:
            UserError: if the loss of the step before is not finite.
        """
        scalars = torch.stack((loss, grad_norm.to(loss.dtype)))
        arrived = None
        if scalars.is_cuda:
            # A copy into pinned memory does not wait; the event tells, a step later, that it has arrived.
            host = self._pinned[len(self.losses) % 2]
            scalars, arrived = host.copy_(scalars, non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._write_pending()
        now = time.perf_counter()
        self._tokens += tokens
        self._seconds += now - self._last_step
        line = {
            "step": len(self.losses) + 1,
            "total_steps": self._total_steps,
            "lr": lr,
            "tokens": self._tokens,
            "tokens_per_s": round(tokens / (now - self._last_step), 1),
            "memory_mib": round(self._memory_mib(), 1),
            "time_s": round(self._seconds, 4),
        }
        self._pending = (line, scalars, arrived)
        self._last_step = now

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        line, scalars, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()
        loss, grad_norm = scalars.tolist()
        self.losses.append(loss)
        skipped = not math.isfinite(grad_norm)
        self.skipped_steps += skipped
        finite_norm = None if skipped else grad_norm  # JSON has no infinity
        line = {"step": line["step"], "total_steps": line["total_steps"], "loss": loss, "grad_norm": finite_norm} | line
        self._file.write(json.dumps(line) + "\n")
        if (now := time.perf_counter()) - self._last_flush > FLUSH_SECONDS:
            self._file.flush()
            self._last_flush = now
        hint = "training stopped; lower training.lr, or use bf16 instead of fp16"
        if not math.isfinite(loss):
            raise UserError(f"the loss of optimizer step {line['step']} is {loss}: {hint}")
        if skipped and not self._may_skip:
            raise UserError(f"the gradient's norm at optimizer step {line['step']} is {grad_norm}: {hint}")
