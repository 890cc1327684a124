"""Progress on the terminal: of a run, and of anything else that is long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama_ft.records.metrics import StepMetrics
from llama_ft.records.result import Result
from llama_ft.reporting.table import amount

PLAIN_SECONDS = 10  # between the lines that stand for the bar where there is no terminal


class RunProgress(Progress):
    """Listens to one run."""

    def __init__(self, console: Console, title: str) -> None:
        count, numbers = TextColumn("  {task.completed}/{task.total}"), TextColumn("{task.fields[numbers]}")
        columns = (count, BarColumn(bar_width=None), numbers, TimeRemainingColumn(compact=True))
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal, expand=True)
        self._last_plain = time.monotonic()
        console.print(title, style="bold", highlight=False, markup=False)

    def message(self, line: str) -> None:
        """Print a line of the run."""
        self.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    def step(self, metrics: StepMetrics) -> None:
        """Move the bar."""
        numbers = (
            f"loss {metrics.loss:.3f}  lr {metrics.lr:.1e}  {metrics.tokens_per_s:,.0f} tokens/s"
            f"  {metrics.memory_mib:,.0f} MiB"
        )
        if not self.task_ids:
            self.add_task("", total=metrics.total_steps, numbers=numbers)
        self.update(self.task_ids[0], completed=metrics.step, numbers=numbers)
        if self.disable and time.monotonic() - self._last_plain > PLAIN_SECONDS:
            self.message(f"{metrics.step}/{metrics.total_steps}  {numbers}")
            self._last_plain = time.monotonic()


def ending(result: Result) -> str:
    """One line for a run that is over."""
    if result.status != "ok":
        return f"{result.status}: {result.error}"
    figures = {"peak {} MiB": result.peak_memory_mib, "{} s": result.runtime_s, "{} tokens/s": result.tokens_per_s}
    parts = [form.format(amount(value)) for form, value in figures.items() if value is not None]
    if result.train_loss_before is not None and result.train_loss_after is not None:
        parts.append(f"loss {result.train_loss_before:.3f} before, {result.train_loss_after:.3f} after")
    return f"ok: {', '.join(parts)}"


@contextmanager
def progress_bar(console: Console, title: str, total: int, unit: int = 1) -> Iterator[Callable[[int], None]]:
    """A bar of whole units while the block runs; what is given is called with how many more of `total` are done."""
    done, n_units, last_line = 0, round(total / unit), time.monotonic()
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=n_units)

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            bars.update(task, completed=done // unit)
            if not console.is_terminal and time.monotonic() - last_line > PLAIN_SECONDS:
                console.print(f"  {title}: {done // unit}/{n_units}", highlight=False, markup=False, soft_wrap=True)
                last_line = time.monotonic()

        yield advance
