"""Progress on the terminal, of a run or another long task."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama_ft.records.metrics import EvalMetrics, Metrics
from llama_ft.records.result import Result
from llama_ft.reporting.table import amount
from llama_ft.system import Advance

PLAIN_SECONDS = 10  # between the lines that replace the bar without a terminal


class Bar(Progress):
    """A bar on a terminal; elsewhere a line every few seconds."""

    def __init__(self, console: Console, n_known: int = 0, margin: str = "  ") -> None:
        """`n_known` held-out losses, printed before a run was stopped, are not repeated; `margin` begins each line."""
        what, numbers = TextColumn("  {task.description}"), TextColumn("{task.fields[numbers]}")
        columns = (what, MofNCompleteColumn(), BarColumn(bar_width=None), numbers, TimeRemainingColumn(compact=True))
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal, expand=True)
        self._last_line, self._held_out, self._n_known, self._margin = time.monotonic(), "", n_known, margin

    def message(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(f"{self._margin}{line}", highlight=False, markup=False, soft_wrap=True)

    def show(self, title: str, done: int, total: int, numbers: str = "") -> None:
        """Show the progress."""
        if not self.task_ids:
            self.add_task(title, total=total, numbers=numbers)
        self.update(self.task_ids[0], completed=done, numbers=numbers)
        if self.disable and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self.message(f"{title} {done}/{total}  {numbers}".strip())
            self._last_line = time.monotonic()

    def step(self, metrics: Metrics) -> None:
        """Show a run's progress; a held-out loss also gets its own line."""
        if isinstance(metrics, EvalMetrics):
            self._held_out = f"held-out {metrics.eval_loss:.3f}  "
            self._n_known -= 1
            if self._n_known >= 0:
                return
            figures = f"perplexity {metrics.eval_perplexity:.4g}, token accuracy {metrics.eval_token_accuracy:.1%}"
            self.message(f"after step {metrics.step}: held-out loss {metrics.eval_loss:.4f}, {figures}")
            return
        loss = f"loss {metrics.loss:.3f}  {self._held_out}"
        figures = f"{loss}lr {metrics.lr:.1e}  {metrics.tokens_per_s:,.0f} tokens/s  {metrics.memory_mib:,.0f} MiB"
        self.show("", metrics.step, metrics.total_steps, figures)


def ending(result: Result) -> str:
    """One line about a run that has ended."""
    if result.status != "ok":
        return f"{result.status}: {result.error}"
    figures = {"peak {} MiB": result.peak_memory_mib, "{} s": result.runtime_s, "{} tokens/s": result.tokens_per_s}
    parts = [form.format(amount(value)) for form, value in figures.items() if value is not None]
    if result.train_loss_before is not None and result.train_loss_after is not None:
        parts.append(f"loss {result.train_loss_before:.3f} before, {result.train_loss_after:.3f} after")
    if result.eval_loss is not None and result.eval_loss_before is not None:
        parts.append(f"held-out loss {result.eval_loss_before:.3f} before, {result.eval_loss:.3f} after")
    if result.eval_loss is not None and result.best_eval_step != result.last_eval_step:
        parts.append(f"lowest {result.best_eval_loss:.3f} after step {result.best_eval_step}")
    return f"ok: {', '.join(parts)}"


@contextmanager
def progress_bar(console: Console, title: str, total: int, unit: int = 1) -> Iterator[Advance]:
    """Show a bar of whole units during the block; the yielded function is called with each increment to `total`."""
    done, n_units = 0, round(total / unit)
    with Bar(console) as bar:
        bar.add_task(f"{title}:", total=n_units, numbers="")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.show(f"{title}:", done // unit, n_units)

        yield advance
