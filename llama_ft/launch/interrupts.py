"""Ctrl-C in a run: at once at first; once there is something to save, at the end of the optimizer step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupts:
    """What the run's process does at SIGINT."""

    held = False  # whether, instead of being raised, an interrupt is noted
    requested = False  # whether one was noted

    def install(self) -> None:
        """Handle SIGINT from now on, also where a shell that put the run into the background has it ignored."""
        signal.signal(signal.SIGINT, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _handle(self, *_: object) -> None:
        if not self.held:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """No interrupt inside; one that comes meanwhile comes at the end. A process started inside begins so too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
