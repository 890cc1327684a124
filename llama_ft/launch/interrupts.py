"""Stopping a run by Ctrl-C or a queue's signal: at once at first, later at the end of the optimizer step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SLURM's at a time limit, and before it the one that --signal names; submitit's is SIGUSR2. All of a job's processes
# get them.
QUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ALL_SIGNALS = {signal.SIGINT, *QUEUE_SIGNALS}


class StoppedByQueue(KeyboardInterrupt):
    """A signal of a queue or the system instead of Ctrl-C: the run is to be saved, and resumes in another job."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.name = number, signal.Signals(number).name


class Interrupts:
    """Handles the signals that stop the run's process."""

    held = False  # an interrupt is noted instead of raised
    requested = False  # an interrupt was noted
    queue_signal: str | None = None  # name of the queue's signal that came

    def install(self) -> None:
        """Handle signals from now on, even if a shell that started us in the background ignores SIGINT."""
        for number in ALL_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)

    def ignore(self) -> None:
        """Ignore signals from now on: the result must be written, and the watching process repeats its signals."""
        for number in ALL_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number in QUEUE_SIGNALS:
            self.queue_signal = signal.Signals(number).name
        if not self.held:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Block the signals inside the context; a pending one is delivered on exit. Processes started inside inherit it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)


@contextmanager
def queue_signals_raised() -> Iterator[None]:
    """Inside the context, the first signal of a queue raises StoppedByQueue, and later ones do nothing.

    Once the block has ended by it, the previous handler is called: submitit's asks the queue to start the job again,
    after which the job is soon killed, so that saving must come first.
    """

    def handle(number: int, _: FrameType | None) -> None:
        for each in QUEUE_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise StoppedByQueue(number)

    before = {number: signal.signal(number, handle) for number in QUEUE_SIGNALS}
    try:
        yield
    except StoppedByQueue as stopped:
        if callable(handler := before[signal.Signals(stopped.number)]):
            handler(stopped.number, None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
