"""A Weights & Biases run. The only module that imports wandb."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb


class WandbRun:
    """One W&B run for one run of ours. Whatever goes wrong with it costs the tracking, never the training."""

    def __init__(
        self,
        project: str,
        mode: str,
        run_dir: Path,
        settings: dict[str, Any],
        group: str | None,
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=project,
                mode=mode,  # type: ignore[arg-type]
                dir=run_dir,
                name=run_dir.name,
                group=group,
                job_type="train",
                config=settings,
                # A sweep is several runs in one process; what a run prints is in its train.log already.
                reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off", init_timeout=30),
            )
        except Exception as error:
            self._failed(error)

    def step(self, metrics: dict[str, Any]) -> None:
        """Log a step's numbers."""
        if self._run is None:
            return
        try:
            values = {key: value for key, value in metrics.items() if key != "step"}
            # Committed at once: a row held back would overwrite the summary with the last step's values.
            self._run.log(values, step=metrics["step"], commit=True)
        except Exception as error:
            self._failed(error)

    def finish(self, result: dict[str, Any] | None) -> None:
        """Put the result into the run's summary and close the run; its state is crashed unless the result is ok."""
        if self._run is None:
            return
        try:
            if result is not None:
                self._run.summary.update(json.loads(json.dumps({k: v for k, v in result.items() if k != "command"})))
            self._run.finish(exit_code=0 if result is not None and result["status"] == "ok" else 1)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        run, self._run = self._run, None
        if run is not None:
            with suppress(Exception):
                run.finish(exit_code=1)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        self._warn(f"W&B failed and is off for the rest of this run ({reason}). The local files hold everything.")
