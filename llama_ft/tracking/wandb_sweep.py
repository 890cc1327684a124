"""A sweep in Weights & Biases: one run beside those of its rows, with the table, its charts and its pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

from llama_ft.config import TrackerConfig
from llama_ft.tracking.wandb_run import WandbRun

CHARTS = {"peak_memory_mib": "Peak memory, MiB", "runtime_s": "Runtime, s", "tokens_per_s": "Tokens/s"}


def send_sweep(
    config: TrackerConfig,
    sweep_dir: Path,
    columns: list[str],
    rows: list[list[Any]],
    files: list[Path],
    warn: Callable[[str], None],
) -> None:
    """Send a sweep's report, in place of an earlier one of the same folder."""
    name = sweep_dir.absolute().name
    about = {
        "project": config.project,
        "group": name,
        "job_type": "sweep",
        "name": f"{name}: table",
        "tags": ["sweep"],
        "config": {key: {"name": rows[0][columns.index(key)]} for key in ("model", "gpu")},
    }
    run = WandbRun(config, sweep_dir, about, warn)
    run.do(lambda run: run.log(media(columns, rows, files)))
    run.keep({file.name: file for file in files})
    run.close(ok=True)


def media(columns: list[str], rows: list[list[Any]], files: list[Path]) -> dict[str, Any]:
    """The table, a bar chart for each figure, the pictures."""
    logged: dict[str, Any] = {"table2": wandb.Table(columns=list[str | int](columns), data=rows)}
    for key, title in CHARTS.items():
        values = [(" ".join(filter(None, row[:2])), row[columns.index(key)]) for row in rows]
        bars = wandb.Table(columns=["run", key], data=[[run, value] for run, value in values if value is not None])
        logged[f"charts/{key}"] = wandb.plot.bar(bars, "run", key, title=title)
    pictures = [file for file in files if file.suffix == ".png"]
    return logged | {f"pictures/{file.stem}": wandb.Image(str(file)) for file in pictures}
