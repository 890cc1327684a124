"""`python -m llama_ft.train`: fine-tune with one combination of techniques, or with several (-m), and measure each."""

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import cast

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from llama_ft import cli
from llama_ft.cli.hydra_keys import check_name
from llama_ft.cli.job import run_job
from llama_ft.cli.sweep_start import ENDED, STARTED, UNTIL_THE_END, ended, is_tuned, runs_here
from llama_ft.cli.usage import OPTIONS
from llama_ft.config import TrackerConfig, TrainConfig, config_dir
from llama_ft.records.result import FINISHED, LOG_FILE, RESULT_FILE
from llama_ft.reporting.best import best_lines
from llama_ft.reporting.reports import SWEEP_FILES, records, report_sweep
from llama_ft.tracking import track_sweep

USAGE = cli.Usage(
    "train",
    "Fine-tune LLaMA with one combination of techniques, or with several (-m), each measured in its own process.",
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
    """Run the command; return 0 if each run ended ok or out of memory, which is a result too."""
    cli.register()
    typed = cli.as_typed(sys.argv[1:], TrainConfig, sweeps=cli.is_sweep(sys.argv[1:]))
    # Hydra accepts -m only before the overrides.
    sys.argv[1:] = sorted(typed, key=lambda argument: argument not in ("-m", "--multirun"))
    for override in cli.typed_overrides():  # before Hydra makes the folder
        if override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
            check_name(override.key_or_group, override.value())
    with UNTIL_THE_END:
        try:
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(run_job)()
        except KeyboardInterrupt:
            for config in STARTED:
                report_unfinished(folder_of(config))
            raise
        except ValueError:  # from Optuna if no trial was completed; each run has reported the reason
            if not STARTED or not is_tuned() or {*FINISHED} & {*ended(folder_of(STARTED[0])).values()}:
                raise
        except RuntimeError as error:  # from a launcher, about a killed process or a canceled job
            if not STARTED or runs_here():
                raise
            report_unfinished(folder_of(STARTED[0]))
            raise cli.Stop(" ".join(str(error).splitlines()[:2])) from error
        return end_of_sweep(STARTED[0]) if STARTED else 0


def folder_of(config: DictConfig) -> Path:
    """A sweep's folder."""
    return Path(config.hydra.sweep.dir).absolute()


def report_unfinished(sweep_dir: Path) -> None:
    """Report on the runs of a sweep so far, and say how to resume it."""
    if any(sweep_dir.glob(f"*/{RESULT_FILE}")):
        report_sweep(sweep_dir, Console())
    elif not any(sweep_dir.glob(f"*/{LOG_FILE}")):
        return
    jobs = "" if runs_here() else "submitted jobs may still run; "
    print(f"{jobs}the same command with hydra.sweep.dir={sweep_dir} resumes the sweep", file=sys.stderr)


def end_of_sweep(config: DictConfig) -> int:
    """Report on a sweep whose runs have all ended, wherever they ran; return the command's exit status."""
    sweep_dir, console, statuses = folder_of(config), Console(), ended(folder_of(config))
    shutil.rmtree(sweep_dir / ENDED, ignore_errors=True)
    log = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    groups = report_sweep(sweep_dir, console)
    objective = list(config.sweep.objective)
    for line in best_lines(groups, objective) if is_tuned() or objective else ():
        log(line)
    tracker = cast(TrackerConfig, OmegaConf.to_object(config.tracker))
    track_sweep(tracker, sweep_dir, records(groups), SWEEP_FILES, log)
    failed = [f"{name} ({status})" for name, status in statuses.items() if status not in FINISHED]
    if failed:
        print(f"{len(failed)} of {len(statuses)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return cli.FAILED if failed else 0


if __name__ == "__main__":
    cli.run_command(main, USAGE)
