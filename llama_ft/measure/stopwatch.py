"""Measures time and energy on a device."""

import time
from collections.abc import Callable

import torch


class Stopwatch:
    """Sums the time and energy of its parts, with the device idle at both ends of each.

    `joules` reads an energy meter; it returns None if there is none.
    """

    def __init__(self, device: torch.device, joules: Callable[[], float | None] = lambda: None) -> None:
        self._device, self._joules = device, joules
        self._start: tuple[float, float | None] = 0.0, None
        self._measured_j = self._measured_s = 0.0
        self.seconds = 0.0

    def start(self) -> None:
        """Begin a part."""
        self._start = self._now(), self._joules()

    def stop(self) -> None:
        """End the part."""
        seconds, end_j = self._now() - self._start[0], self._joules()
        self.seconds += seconds
        if end_j is not None and self._start[1] is not None:
            self._measured_j += end_j - self._start[1]
            self._measured_s += seconds

    @property
    def mean_power_w(self) -> float | None:
        """Energy divided by time over the parts; None if not measured."""
        return self._measured_j / self._measured_s if self._measured_s else None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
