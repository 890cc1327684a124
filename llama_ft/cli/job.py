"""One run of `train`, as Hydra's launchers call it: in the command's process, in another, or on another machine.

Runs share no state, and processes exchange only this function and the config: a run's results are in its folder.
"""

import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from llama_ft import cli
from llama_ft.cli.compose import swept_configs, swept_keys, typed_in
from llama_ft.cli.hydra_keys import check_name, check_resumable, without_effect
from llama_ft.cli.sweep_start import note_ended, runs_here
from llama_ft.config import DeviceChoice, TrackerKind, TrainConfig, UserError
from llama_ft.config.checks import Settings
from llama_ft.launch import folder
from llama_ft.launch.interrupts import queue_signals_raised
from llama_ft.launch.machines import Place, held_place
from llama_ft.launch.process import SECONDS_FOR_THE_LAST, run_in_child
from llama_ft.records.metrics import Metrics, evaluations_of, read_metrics
from llama_ft.records.result import FINISHED, Result, new_result, read_result, unmeasured_result, write_result
from llama_ft.reporting.best import objective_of
from llama_ft.reporting.progress import Bar, ending
from llama_ft.system import Log
from llama_ft.tracking import start_tracker

SAID: set[str] = set()  # lines that this process has printed


def run_job(config: DictConfig) -> float | list[float] | None:
    """Do one run, and return its objective to Hydra's sweeper. A failed run outside a sweep ends the process."""
    settings = HydraConfig.get()
    os.chdir(settings.runtime.cwd)  # so that hydra.job.chdir=true does not change what relative paths mean
    run_dir, is_sweep = Path(settings.runtime.output_dir), settings.mode == RunMode.MULTIRUN
    sweep_dir = Path(settings.sweep.dir).absolute() if is_sweep else None
    job = Job(run_dir, sweep_dir, settings.callbacks["sweep"].command, not is_sweep or runs_here())
    try:
        if not is_sweep:
            check_name("hydra.run.dir", settings.run.dir)
        # Locked before the first look into the folder: a run whose command was killed may still be saving, and one on
        # another machine may take days.
        with (
            queue_signals_raised(),
            held_place(config.parallel, run_dir, SECONDS_FOR_THE_LAST if job.is_here else math.inf, job.log) as place,
        ):
            result = job.run_locked(config, place)
    except (UserError, cli.Stop) as error:
        raise (cli.Stop if job.is_here else UserError)(str(error)) from error
    if sweep_dir:
        note_ended(sweep_dir, run_dir.name, result.status)
    elif result.status not in FINISHED:
        print(ending(result), file=sys.stderr)
        sys.exit(cli.FAILED)
    return objective_of(result, list(config.sweep.objective))


@dataclass
class Job:
    """A requested run."""

    run_dir: Path
    sweep_dir: Path | None
    command: str
    is_here: bool  # in the command's own process, where a sweep's runs follow each other

    def __post_init__(self) -> None:
        self.console = Console(force_terminal=None if self.is_here else False)  # bars of several runs would mix
        self.number = HydraConfig.get().job.num if self.sweep_dir else 0

    def run_locked(self, config: DictConfig, place: Place) -> Result:
        """Return the run's result: of a new run, of one finished before, or of one that cannot start."""
        self.run_dir = place.folder
        settings = cast(Settings, OmegaConf.to_container(config, enum_to_str=True))
        try:
            checked = cli.checked_config(config, list(HydraConfig.get().overrides.task), TrainConfig)
        except Exception as error:
            # Before the first row has run nothing is lost, and the others may be wrong in the same way.
            return self.refuse(settings, cli.explain(error), go_on=self.number > 0 or not self.is_here)
        if self.number == 0:
            self.remark(checked)
        try:
            folder.check_inputs(self.run_dir, checked)
            previous = read_result(place.run_dir)
            if previous and (finished := self.finished_before(checked, place.run_dir, previous)):
                return finished
            check_resumable(checked, self.run_dir, self.sweep_dir is not None)
            if previous and previous.stopped_by and self.sweep_dir:  # by a queue, which has started it again
                checked.training.resume = True
            folder.clear(self.run_dir, checked)
        except UserError as error:
            return self.refuse(settings, str(error), go_on=self.sweep_dir is not None)
        try:
            return self.run(checked, place)
        except KeyboardInterrupt:
            if read_result(self.run_dir) is None:  # the run's process had not been started yet
                early = new_result(checked, self.command)
                early.status, early.error = "interrupted", "interrupted before the start"
                write_result(self.run_dir, early)
            raise

    def remark(self, config: TrainConfig) -> None:
        """Print remarks on the arguments."""
        composed = cast(DictConfig, HydraConfig.instance().cfg)
        typed = typed_in(composed)
        alternatives = partial(swept_configs, composed) if self.sweep_dir else lambda _: ()
        lines = cli.remarks(config, [str(override.input_line) for override in typed], alternatives)
        swept = swept_keys() if self.sweep_dir else None
        for line in (*lines, *without_effect([override.key_or_group for override in typed], swept)):
            self.log(line)

    def refuse(self, settings: Settings, reason: str, go_on: bool) -> Result:
        """The result of a run that does not start, written unless there is an earlier one; stop unless `go_on`."""
        result = unmeasured_result(settings, self.command, reason)
        write_result(self.run_dir, result, replaces=False)
        if not go_on:
            raise cli.Stop(reason)
        self.log(f"{self.run_dir.name}: {reason}")
        return result

    def finished_before(self, config: TrainConfig, run_dir: Path, previous: Result) -> Result | None:
        """Return the folder's result if the run need not be repeated."""
        if previous.config_hash is None:
            return None
        if previous.config_hash != config.hash():
            if folder.goes_on(run_dir, config, previous):
                if not folder.has_lost_patience(run_dir, config, previous):
                    return None
                stopped = f"{run_dir.name}: stopped early, after optimizer step {previous.stopped_early_at_step}"
                self.log(f"{stopped}; to continue it give a larger training.patience, or null")
                return previous
            earlier = folder.earlier_config(run_dir)
            what = f": {folder.differences(earlier, config)}" if earlier else ""
            raise cli.Stop(f"{run_dir} holds a run with another configuration{what}; {folder.ELSEWHERE}")
        if previous.status not in FINISHED:
            return None
        self.log(f"{run_dir.name}: done before ({previous.status}){ending(previous).removeprefix(previous.status)}")
        return previous

    def run(self, config: TrainConfig, place: Place) -> Result:
        """Run in a separate process and watch it."""
        run_dir, group = self.run_dir, self.sweep_dir.name if self.sweep_dir else None
        if self.is_here:
            self.log(run_dir.name if self.sweep_dir else config.optim.combination, style="bold")
        margin = "  " if self.is_here else f"{run_dir.name}: "
        with Bar(self.console, len(evaluations_of(read_metrics(run_dir))), margin) as display:
            tracked = config.tracker if place.is_first else replace(config.tracker, kind=TrackerKind.disabled)
            tracker = start_tracker(tracked, run_dir, config.to_dict(), group, display.message)

            def on_step(metrics: Metrics) -> None:
                display.step(metrics)
                tracker.step(metrics)

            # In a sweep, a row that runs out of memory is a result too.
            check_fit = config.plan.enforce and not self.sweep_dir and config.gpu.device is not DeviceChoice.cpu
            result, log = None, partial(say_once, log=display.message)
            try:
                result = run_in_child(config, place, self.command, check_fit, log, on_step)
            finally:
                tracker.finish(result or read_result(run_dir))
            is_said = place.is_first or result.error  # the figures are the first machine's
            if is_said and (self.sweep_dir or result.status in FINISHED):
                display.message(ending(result))
        if not self.sweep_dir:
            there = "results" if place.is_first else "the results are on the first machine; the log of this one"
            self.log(f"  {there}: {run_dir}")
        return result

    def log(self, line: str, style: str | None = None) -> None:
        """Print a line unchanged."""
        self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def say_once(line: str, log: Log) -> None:
    """Print a line unless an earlier run in this process did."""
    if line not in SAID:
        SAID.add(line)
        log(line)
