"""`python -m llama_ft.train`: fine-tune with one combination of techniques, or with `-m` with many, and measure it."""

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from llama_ft import cli
from llama_ft.cli.hydra_keys import check_directions, check_name, check_resumable, check_seeds, without_effect
from llama_ft.cli.usage import OPTIONS
from llama_ft.config import DeviceChoice, SweepConfig, TrackerConfig, TrackerKind, TrainConfig, UserError, config_dir
from llama_ft.config.checks import Settings
from llama_ft.files import check_replaceable, locked
from llama_ft.launch.folder import (
    ELSEWHERE,
    check_inputs,
    clear,
    differences,
    earlier_config,
    goes_on,
    has_lost_patience,
)
from llama_ft.launch.machines import Place, held_place
from llama_ft.launch.process import SECONDS_FOR_THE_LAST, run_in_child
from llama_ft.records.metrics import Metrics, evaluations_of, read_metrics
from llama_ft.records.result import (
    FINISHED,
    RESULT_FILE,
    Result,
    new_result,
    read_result,
    unmeasured_result,
    write_result,
)
from llama_ft.reporting.best import best_lines, objective_of
from llama_ft.reporting.progress import Bar, ending
from llama_ft.reporting.reports import SWEEP_FILES, SWEEP_MARK, report_sweep
from llama_ft.reporting.table2 import records
from llama_ft.system import Log
from llama_ft.tracking import start_tracker, track_sweep


class TrainCommand:
    """The command's state over the runs of a sweep."""

    def __init__(self) -> None:
        self.console = Console()
        self.sweep_dir: Path | None = None
        self.tracker, self.sweep = TrackerConfig(), SweepConfig()
        self.is_tuned = False  # whether a sweep's runs are chosen by what earlier ones returned
        self.results: dict[str, Result] = {}  # by the name of the run's folder
        self.seen_messages: set[str] = set()
        self.locks = ExitStack()  # kept until the command ends

    def job(self, config: DictConfig) -> float | list[float] | None:
        """One run, and what it tells Hydra's sweeper. Hydra calls it for each."""
        settings = HydraConfig.get()
        os.chdir(settings.runtime.cwd)  # so that hydra.job.chdir=true does not change what relative paths mean
        run_dir, is_sweep = Path(settings.runtime.output_dir), settings.mode == RunMode.MULTIRUN
        try:
            check_name(*("hydra.sweep.dir", settings.sweep.dir) if is_sweep else ("hydra.run.dir", settings.run.dir))
            if is_sweep and self.sweep_dir is None:
                self.sweep_dir = Path(settings.sweep.dir).absolute()
                self.locks.enter_context(locked(self.sweep_dir))
                check_replaceable(self.sweep_dir, SWEEP_FILES, SWEEP_MARK)
                check_directions(config.sweep.objective)
                self.is_tuned = settings.runtime.choices["hydra/sweeper"] != "basic"
                if self.is_tuned:
                    check_seeds(swept_keys())
            # Held from before the first look into the folder: a run whose command was killed may still be saving.
            with held_place(config.parallel, run_dir, SECONDS_FOR_THE_LAST) as place:
                result = self.results[run_dir.name] = self.run_locked(config, place)
        except UserError as error:
            raise cli.Stop(str(error)) from error
        return objective_of(result, self.sweep.objective)

    def run_locked(self, config: DictConfig, place: Place) -> Result:
        """The run's result, whether it is run, was finished before, or cannot be run."""
        run_dir, settings = place.folder, cast(Settings, OmegaConf.to_container(config, enum_to_str=True))
        try:
            checked = cli.checked_config(config, list(HydraConfig.get().overrides.task), TrainConfig)
        except Exception as error:
            # While no row has run nothing is lost, and the others may well be wrong in the same way.
            return self.refuse(settings, run_dir, cli.explain(error), go_on=bool(self.results))
        self.tracker, self.sweep = checked.tracker, checked.sweep
        if not self.results:
            self.remark(checked)
        try:
            check_inputs(run_dir, checked)
            if finished := self.finished_before(checked, place.run_dir):
                return finished
            check_resumable(checked, run_dir, self.sweep_dir is not None)
            clear(run_dir, checked)
        except UserError as error:
            return self.refuse(settings, run_dir, str(error), go_on=self.sweep_dir is not None)
        try:
            return self.run(checked, place)
        except KeyboardInterrupt:
            if not (run_dir / RESULT_FILE).exists():  # the run's process had not been started yet
                early = new_result(checked, cli.command_line())
                early.status, early.error = "interrupted", "interrupted before the start"
                write_result(run_dir, early)
            raise

    def remark(self, config: TrainConfig) -> None:
        """Say what is given and would surprise."""
        composed, typed = cast(DictConfig, HydraConfig.instance().cfg), cli.typed_overrides()
        alternatives = partial(cli.swept_configs, composed) if self.sweep_dir else lambda _: ()
        lines = cli.remarks(config, [str(override.input_line) for override in typed], alternatives)
        hydras = without_effect([override.key_or_group for override in typed], swept_keys() if self.sweep_dir else None)
        for line in (*lines, *hydras):
            self.log_once(line)

    def refuse(self, settings: Settings, run_dir: Path, reason: str, go_on: bool) -> Result:
        """The result of a run that does not begin, written unless an earlier one is there; or the command's end."""
        result = unmeasured_result(settings, cli.command_line(), reason)
        if not (run_dir / RESULT_FILE).exists():
            write_result(run_dir, result)
        if not go_on:
            raise cli.Stop(reason)
        self.log(f"{run_dir.name}: {reason}")
        return result

    def finished_before(self, config: TrainConfig, run_dir: Path) -> Result | None:
        """The result that the folder holds, if the run need not be done again."""
        previous = read_result(run_dir)
        if previous is None or previous.config_hash is None:
            return None
        if previous.config_hash != config.hash():
            if goes_on(run_dir, config, previous):
                if not has_lost_patience(run_dir, config, previous):
                    return None
                stopped = f"{run_dir.name}: stopped early, after optimizer step {previous.stopped_early_at_step}"
                self.log(f"{stopped}, and goes on with more training.patience alone, or with null")
                return previous
            earlier = earlier_config(run_dir)
            what = f": {differences(earlier, config)}" if earlier else ""
            raise cli.Stop(f"{run_dir} holds a run with another configuration{what}; {ELSEWHERE}")
        if previous.status not in FINISHED:
            return None
        self.log(f"{run_dir.name}: done before ({previous.status}){ending(previous).removeprefix(previous.status)}")
        return previous

    def run(self, config: TrainConfig, place: Place) -> Result:
        """Run in a process of its own, watched."""
        tracked = config.tracker if place.is_first else replace(config.tracker, kind=TrackerKind.disabled)
        run_dir = place.folder
        group, title = (self.sweep_dir.name, run_dir.name) if self.sweep_dir else (None, config.optim.combination)
        self.console.print(title, style="bold", highlight=False, markup=False)
        with Bar(self.console, len(evaluations_of(read_metrics(run_dir)))) as display:
            tracker = start_tracker(tracked, run_dir, config.to_dict(), group, display.message)

            def on_step(metrics: Metrics) -> None:
                display.step(metrics)
                tracker.step(metrics)

            # Of a sweep, a row that runs out of memory is a result too.
            check_fit = config.plan.enforce and not self.sweep_dir and config.gpu.device is not DeviceChoice.cpu
            result, log = None, partial(self.log_once, log=display.message)
            try:
                result = run_in_child(config, place, cli.command_line(), check_fit, log, on_step)
            finally:
                tracker.finish(result or read_result(run_dir))
            if self.sweep_dir or result.status in FINISHED:
                display.message(ending(result))
        if not self.sweep_dir:
            self.log(f"  {place.holds}: {run_dir}")
        return result

    def log(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def log_once(self, line: str, log: Log | None = None) -> None:
        """Print a line unless an earlier run of the sweep did."""
        if line not in self.seen_messages:
            self.seen_messages.add(line)
            (log or self.log)(line)

    def main(self) -> int:
        """Run everything asked for; 0 if each run ended ok or, as a result to report, out of memory."""
        cli.register()
        typed = cli.as_typed(sys.argv[1:], TrainConfig, sweeps=cli.is_sweep(sys.argv[1:]))
        # Hydra takes -m in front of the overrides alone.
        sys.argv[1:] = sorted(typed, key=lambda argument: argument not in ("-m", "--multirun"))
        for override in cli.typed_overrides():  # before Hydra makes the folder
            if override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
                check_name(override.key_or_group, override.value())
        try:
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(self.job)()
        except KeyboardInterrupt:
            if self.results and self.sweep_dir is not None:
                report_sweep(self.sweep_dir, self.console)
                print(f"the same command with hydra.sweep.dir={self.sweep_dir} goes on from here", file=sys.stderr)
            raise
        except ValueError:  # from Optuna where no trial was completed; why, is said of each run
            if not self.is_tuned or any(result.status in FINISHED for result in self.results.values()):
                raise
        if self.sweep_dir is not None:
            groups = report_sweep(self.sweep_dir, self.console)
            for line in best_lines(groups, self.sweep.objective) if self.is_tuned or self.sweep.objective else ():
                self.log(line)
            track_sweep(self.tracker, self.sweep_dir, records(groups), SWEEP_FILES, self.log)
        failed = {name: result for name, result in self.results.items() if result.status not in FINISHED}
        if failed and self.sweep_dir is None:
            print(ending(*failed.values()), file=sys.stderr)
        elif failed:
            names = ", ".join(f"{name} ({result.status})" for name, result in failed.items())
            print(f"{len(failed)} of {len(self.results)} runs failed: {names}", file=sys.stderr)
        return cli.FAILED if failed else 0


def swept_keys() -> list[str]:
    """The keys and groups of which the sweep has several values."""
    return [override.key_or_group for override in cli.swept(cast(DictConfig, HydraConfig.instance().cfg))]


USAGE = cli.Usage(
    "train",
    "Fine-tune LLaMA with one combination of techniques, or with -m with many, each measured in its own process.",
    "[-m] [GROUP=CHOICE ...] [KEY=VALUE ...]",
    TrainConfig,
    (
        "optim=ga_mp_lora",
        "optim=lora data.validation=0.1 training.eval_every=50 training.keep_best=true",
        "experiment=table2",
        "-m 'optim=glob(*)' gpu=a100_40gb",
        "-m optim.lora=true lora.rank=4,16 hydra.sweep.dir=outputs/rank",
        "model=llama2_7b checkpoint=DIR tokenizer=FILE data=alpaca_200 training=course optim=mp_lora",
    ),
    tuple(OPTIONS),
)


def main() -> int:
    """Fine-tune as asked for."""
    return TrainCommand().main()


if __name__ == "__main__":
    cli.run_command(main, USAGE)
