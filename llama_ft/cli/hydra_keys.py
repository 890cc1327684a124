"""Checks of Hydra's own keys in `train`: its folders, sweeps, and how a sweep chooses its runs."""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from llama_ft.config import SEED, TrainConfig, UserError
from llama_ft.config.checks import check
from llama_ft.system import may_have_gpu
from llama_ft.training.position import checkpoints


def check_name(key: str, folder: object) -> None:
    """Raise a UserError if no folder is named: `hydra.run.dir=$DIR` would mean the current one if DIR is not set."""
    name = "" if folder is None else str(folder).strip()
    check(name != "" and not name.startswith("~"), key, name, "the path of a folder, with ~ written out")


def check_resumable(config: TrainConfig, run_dir: Path, sweeping: bool) -> None:
    """Raise a UserError if a run would discard a saved one (a sweep's row may), or resume in a new folder."""
    found = checkpoints(run_dir)
    key = "hydra.sweep.dir" if sweeping else "hydra.run.dir"
    is_new = not any(key in override for override in HydraConfig.get().overrides.hydra)
    if config.training.resume and is_new and not HydraConfig.get().runtime.choices.get("experiment"):
        raise UserError(f"training.resume=true needs the folder of the run to resume: add {key}=DIR")
    if found and not config.training.resume and not sweeping:
        saved = f"{run_dir} holds a run saved at {found[-1].name}: training.resume=true continues it"
        raise UserError(f"{saved}; to start over delete {found[-1].parent}")


def check_directions(objective: Sequence[str]) -> None:
    """Raise a UserError if the sweeper has directions, and they do not minimize each objective."""
    given: Any = OmegaConf.select(HydraConfig.get().sweeper, "direction")
    directions = [str(getattr(each, "name", each)) for each in (given if OmegaConf.is_list(given) else [given])]
    least = ["minimize"] * max(1, len(objective))
    allowed = f"[{','.join(least)}]" if len(least) > 1 else least[0]
    about = f"{allowed} with sweep.objective=[{','.join(objective)}], where lower is better"
    check(given is None or directions == least, "hydra.sweeper.direction", ",".join(directions), about)


def check_gpus_of_jobs(launcher: Any, on_cpu: bool) -> None:
    """Raise a UserError if jobs of `submitit_local` would see no GPU, or other ones than allowed.

    The launcher gives them the first `gpus_per_node` GPUs, whatever CUDA_VISIBLE_DEVICES is.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if on_cpu or visible in ("", "-1") or not may_have_gpu():
        return
    if visible is not None:
        problem = f"takes GPUs from 0 on, and CUDA_VISIBLE_DEVICES={visible} selects some"
        raise UserError(f"hydra/launcher=submitit_local {problem}: use hydra/launcher=joblib, or unset it")
    if not launcher.gpus_per_node:
        given = "hydra.launcher.gpus_per_node=N, and each job takes a free one, or gpu=cpu"
        raise UserError(f"hydra/launcher=submitit_local shows its jobs no GPU by default: give {given}")


def without_effect(keys: Sequence[str], swept: Collection[str] | None) -> Iterator[str]:
    """Yield a line for each typed key that has no effect in a single run (`swept` is None), or in a sweep."""
    sweeps = swept is not None
    used, idle = ("sweep", "run") if sweeps else ("run", "sweep")
    if f"hydra.{idle}.dir" in keys:
        yield f"hydra.{idle}.dir: no effect, the folder of a {used} is set by hydra.{used}.dir=DIR"
    for key in keys:
        if key.startswith("sweep.") and not sweeps:
            yield f"{key}: no effect without -m, since it applies only to sweeps"
        if key == "sweep.order" and swept is not None and SEED not in swept:
            yield f"{key}: no effect without repeats, such as {SEED}=0,1,2"
        if key == "plan.enforce" and sweeps:
            yield f"{key}: no effect in a sweep, which also measures runs that would not fit"
