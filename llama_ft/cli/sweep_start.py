"""The start of a sweep in the command's process, and its record of the runs that have ended."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from llama_ft import cli
from llama_ft.cli.compose import swept_keys
from llama_ft.cli.hydra_keys import check_directions, check_gpus_of_jobs, check_name
from llama_ft.cli.texts import parsed
from llama_ft.config import SEED, DeviceChoice, Order, UserError
from llama_ft.files import check_replaceable, locked
from llama_ft.reporting.reports import SWEEP_FILES, SWEEP_MARK

HERE = "basic"  # Hydra's launcher that runs in the command's process, one after the other
ENDED = ".ended"  # a folder in the sweep's: a file for each run that has ended, with its status
STARTED: list[DictConfig] = []  # the config of the sweep if this process is its command's
UNTIL_THE_END = ExitStack()  # held until that command ends


class SweepStart(Callback):
    """Hydra's callback in the command's process. It also carries its arguments to the processes of the runs."""

    def __init__(self, typed: str, command: str) -> None:
        """Hydra resolves both arguments here, and passes them to each run's config as `hydra.callbacks.sweep`."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check what concerns all runs, and lock the sweep's folder. Between the runs Hydra has the sweep's config."""
        try:
            order_repeats(config)
            HydraConfig.instance().set_config(config)
            UNTIL_THE_END.callback(setattr, HydraConfig.instance(), "cfg", None)
            check_name("hydra.sweep.dir", config.hydra.sweep.dir)
            check_directions(config.sweep.objective)
            if HydraConfig.get().runtime.choices["hydra/launcher"] == "submitit_local":
                check_gpus_of_jobs(config.hydra.launcher, config.gpu.device == DeviceChoice.cpu)
            if is_tuned() and SEED in swept_keys():
                raise UserError(f"{SEED} has several values, and the sweeper would choose the best of them: give one")
            folder = Path(config.hydra.sweep.dir)
            folder.mkdir(parents=True, exist_ok=True)
            UNTIL_THE_END.enter_context(locked(folder))
            check_replaceable(folder, SWEEP_FILES, SWEEP_MARK)
            shutil.rmtree(folder / ENDED, ignore_errors=True)
            STARTED.append(config)
            UNTIL_THE_END.callback(STARTED.clear)
        except Exception as error:  # Hydra would only warn about it
            raise cli.Stop(cli.explain(error)) from error


def is_tuned() -> bool:
    """Return True if a sweep's runs are chosen by the results of earlier ones."""
    return bool(HydraConfig.get().runtime.choices["hydra/sweeper"] != "basic")


def runs_here() -> bool:
    """Return True if runs take place in the command's own process, one after the other."""
    return bool(HydraConfig.get().runtime.choices["hydra/launcher"] == HERE)


def note_ended(sweep_dir: Path, name: str, status: str) -> None:
    """Tell the command that a run has ended, wherever it took place."""
    (sweep_dir / ENDED).mkdir(exist_ok=True)
    (sweep_dir / ENDED / name).write_text(status)


def ended(sweep_dir: Path) -> Mapping[str, str]:
    """The status of each run of this command that has ended, by the name of its folder, the earliest first."""
    files = sorted((sweep_dir / ENDED).glob("*"), key=lambda file: file.stat().st_mtime_ns)
    return {file.name: file.read_text() for file in files}


def order_repeats(config: DictConfig) -> None:
    """Put the seeds before or after everything else that a sweep varies, as `sweep.order` says.

    Hydra varies the last key the fastest. It makes the runs later, from `hydra.sweeper.params`, which an experiment
    sets, and from the typed overrides.
    """
    params = dict(OmegaConf.select(config, "hydra.sweeper.params") or {})
    typed = list(config.hydra.overrides.task)
    given = [text for text, override in zip(typed, parsed(typed), strict=True) if override.key_or_group == SEED]
    seeds = [*(f"{key}={value}" for key, value in params.items() if key == SEED), *given]
    if not seeds or not parsed(seeds)[-1].is_sweep_override():  # of several the last counts, as for Hydra
        return
    others = {key: value for key, value in params.items() if key != SEED}
    is_first = config.sweep.order == Order.alternate
    config.hydra.sweeper.params = ({SEED: seeds[-1].partition("=")[2]} if is_first else {}) | others
    config.hydra.overrides.task = [text for text in typed if text not in given] + ([] if is_first else seeds[-1:])
