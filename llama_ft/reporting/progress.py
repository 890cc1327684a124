"""Progress on the terminal: of a run, and of anything else that is long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llama_ft.records.metrics import StepMetrics
from llama_ft.records.result import Result
from llama_ft.reporting.table import amount

PLAIN_SECONDS = 10  # between the lines that stand for the bar where there is no terminal


class RunProgress:
    """Listens to one run."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._plain = not console.is_terminal
        self._last_plain = time.monotonic()
        self._progress = Progress(
            TextColumn("  {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=self._plain,
            expand=True,
        )
        self._task: TaskID | None = None
        console.print(title, style="bold", highlight=False, markup=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def message(self, line: str) -> None:
        """Print a line of the run."""
        self._console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    def step(self, metrics: StepMetrics) -> None:
        """Move the bar."""
        numbers = (
            f"loss {metrics.loss:.3f}  lr {metrics.lr:.1e}  {metrics.tokens_per_s:,.0f} tokens/s"
            f"  {metrics.memory_mib:,.0f} MiB"
        )
        step, total = metrics.step, metrics.total_steps
        if self._task is None:
            self._task = self._progress.add_task("", total=total, numbers=numbers)
        self._progress.update(self._task, completed=step, numbers=numbers)
        if self._plain and time.monotonic() - self._last_plain > PLAIN_SECONDS:
            self.message(f"{step}/{total}  {numbers}")
            self._last_plain = time.monotonic()


def ending(result: Result) -> str:
    """One line for a run that is over."""
    if result.status != "ok":
        return f"{result.status}: {result.error}"
    units = (
        ("peak {} MiB", result.peak_memory_mib),
        ("{} s", result.runtime_s),
        ("{} tokens/s", result.tokens_per_s),
    )
    parts = [unit.format(amount(value)) for unit, value in units if value is not None]
    if result.train_loss_before is not None and result.train_loss_after is not None:
        parts.append(f"loss {result.train_loss_before:.3f} before, {result.train_loss_after:.3f} after")
    return f"ok: {', '.join(parts)}"


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar while the block runs; what is given is to be called with how many more of `total` are done."""
    done, last_line = 0, time.monotonic()
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=total)

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            bars.advance(task, count)
            if not console.is_terminal and time.monotonic() - last_line > PLAIN_SECONDS:
                console.print(f"  {title}: {done}/{total}", highlight=False, markup=False, soft_wrap=True)
                last_line = time.monotonic()

        yield advance
