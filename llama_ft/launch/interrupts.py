"""What stops a run, Ctrl-C or a signal of a queue: at once at first, later at the end of the optimizer step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SLURM's at a time limit, and before it those that --signal names; submitit's is SIGUSR2. All of a job's processes get
# them.
QUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ALL_SIGNALS = {signal.SIGINT, *QUEUE_SIGNALS}


class StoppedByQueue(KeyboardInterrupt):
    """A signal of a queue, or of the system, in place of Ctrl-C: the run is to be saved, and goes on in another job."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.name = number, signal.Signals(number).name


class Interrupts:
    """What the run's process does at a signal that stops it."""

    held = False  # whether, instead of being raised, an interrupt is noted
    requested = False  # whether one was noted
    queue_signal: str | None = None  # the name of the queue's signal that came

    def install(self) -> None:
        """Handle signals from now on, also where a shell that put the run into the background has SIGINT ignored."""
        for number in ALL_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)

    def ignore(self) -> None:
        """No more of them: the result must be written, and whoever watches repeats what it sends."""
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
    """No interrupt inside; one that comes meanwhile comes at the end. A process started inside begins so too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)


@contextmanager
def queue_signals_raised() -> Iterator[None]:
    """Inside, the first signal of a queue raises StoppedByQueue, and later ones do nothing.

    Once the block has ended because of it, whoever handled the signal before does so: submitit's handler asks the queue
    to start the job again, and a job that is asked for again is killed soon, so that saving comes first.
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
