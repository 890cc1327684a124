"""A run's folder before the run begins: what may be removed from it, and what must not be."""

import os
from pathlib import Path

from llama_ft.config import TrainConfig, UserError, path_of, read_config
from llama_ft.config.checks import flat
from llama_ft.config.groups import HELD_OUT_FILE
from llama_ft.data.validation import SPLIT
from llama_ft.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, TRAINED_FILES, WEIGHTS_FILE, write_text
from llama_ft.records.metrics import METRICS_FILE, line_of, read_metrics, steps_of
from llama_ft.records.result import CONFIG_FILE, LOG_FILE, RESULT_FILE, Result
from llama_ft.training import position

ALWAYS = (CONFIG_FILE, LOG_FILE, METRICS_FILE)  # every run writes them
RUN_FILES = (*ALWAYS, *TRAINED_FILES, HELD_OUT_FILE, RESULT_FILE)
ELSEWHERE = "name another folder with hydra.run.dir=DIR, or for a sweep hydra.sweep.dir=DIR"
N_SHOWN = 6  # settings that differ
FILE_KEYS = ("data.path", "data.validation", "data.template", "tokenizer", "checkpoint", "adapter")


def check_inputs(run_dir: Path, config: TrainConfig) -> None:
    """Raise a UserError if the run would read a file in its own folder, which may be removed or overwritten."""
    settings = flat(config.to_dict())
    for key in ("checkpoint", "adapter", "tokenizer", "data.path", "data.validation"):
        drawn = key == "data.validation" and (config.data.drawn_validation or str(settings[key]).startswith(SPLIT))
        is_place = not drawn and settings[key] not in (None, "builtin", "random")
        if is_place and path_of(str(settings[key])).resolve().is_relative_to(run_dir.resolve()):
            raise UserError(f"{key}={settings[key]} is in the run's own folder, {run_dir}: {ELSEWHERE}")


def clear(run_dir: Path, config: TrainConfig) -> None:
    """Remove what an earlier run left behind; if it is to be resumed, only what is newer than its checkpoint.

    Everything is checked before anything is removed: only files that the earlier run wrote, by its config.yaml. A
    UserError if there is something else, the checkpoint is another run's, or the metrics before it are missing.
    """
    present = [name for name in RUN_FILES if os.path.lexists(run_dir / name)]
    saved = position.checkpoints(run_dir)
    others = [name for name in present if name != RESULT_FILE]
    others += [folder.name for folder in (*saved, *position.best_weights(run_dir))]
    earlier = earlier_config(run_dir) if others else None
    written = {RESULT_FILE}  # what the earlier run may have written
    if earlier:
        trained = (ADAPTER_FILE, ADAPTER_CONFIG_FILE) if earlier.optim.lora else (WEIGHTS_FILE,)
        drawn = (HELD_OUT_FILE,) if earlier.data.drawn_validation is not None else ()
        written |= {*ALWAYS, *drawn, *(trained if earlier.training.save else ())}
    for name in present if earlier else others:
        if earlier is None or name not in written or (run_dir / name).is_symlink() or not (run_dir / name).is_file():
            raise UserError(f"{run_dir} holds {name}, which no run wrote: {ELSEWHERE}")
    states, metrics = [position.read_state(folder) for folder in saved], None
    if earlier and states and config.training.resume:
        saved_hash, is_earliers = states[-1].config_hash, config.run_hash == earlier.run_hash
        goes_on_from = saved_hash in (config.hash(), earlier.hash() if is_earliers else None)
        if not goes_on_from and config.run_hash != states[-1].run_hash:
            raise UserError(f"{saved[-1]} is from a run with another configuration: {differences(earlier, config)}")
        check_not_shorter(earlier, config, run_dir)
        metrics = _first_lines(run_dir, states[-1].position.step)
    for folder in position.best_weights(run_dir):
        position.check_plain(folder)

    position.remove_older(run_dir, position.N_KEPT if config.training.resume else 0)
    if metrics is not None:
        write_text(run_dir / METRICS_FILE, metrics)
    kept = (CONFIG_FILE,) if metrics is None else (CONFIG_FILE, METRICS_FILE)
    for name in set(present) - set(kept):
        (run_dir / name).unlink()
    for name in written:
        for leftover in run_dir.glob(f".{name}.*.tmp"):
            leftover.unlink()


def check_not_shorter(earlier: TrainConfig, config: TrainConfig, run_dir: Path) -> None:
    """Raise a UserError if the run in the folder would resume with fewer epochs than it had."""
    before, now = earlier.training.epochs, config.training.epochs
    if now < before:
        raise UserError(f"training.epochs={now}: the run in {run_dir} has {before}; give {before} or more")


def goes_on(run_dir: Path, config: TrainConfig, ended: Result) -> bool:
    """Return True if the run trains the one that `ended` in the folder for longer; a UserError if that cannot be."""
    earlier = earlier_config(run_dir)
    if not config.training.resume or earlier is None or earlier.run_hash != config.run_hash:
        return False
    check_not_shorter(earlier, config, run_dir)
    n_steps = max((each.step for each in steps_of(read_metrics(run_dir))), default=0)
    if ended.status == "ok" and n_steps not in map(position.step_of, position.checkpoints(run_dir)):
        trained = "adapter" if config.optim.lora else "checkpoint"
        missing = "no checkpoint of its end to resume, which training.save_every=N or keep_best=true writes"
        advice = f"A new run can start from its weights: {trained}={run_dir} with another hydra.run.dir"
        raise UserError(f"{run_dir} has {missing}. {advice}")
    return True


def has_lost_patience(run_dir: Path, config: TrainConfig, ended: Result) -> bool:
    """Return True if the run in the folder stopped early, and `config` gives it no more patience."""
    earlier, patience = earlier_config(run_dir), config.training.patience
    before = earlier.training.patience if earlier else None
    return ended.stopped_early_at_step is not None and patience is not None and patience <= (before or 0)


def earlier_config(run_dir: Path) -> TrainConfig | None:
    """The config of an earlier run in the folder; None if there is no config.yaml, or it is not a run's."""
    file = run_dir / CONFIG_FILE
    if file.is_symlink() or not file.is_file():
        return None
    try:
        config, lines = read_config(file), file.read_text(encoding="utf-8").splitlines()
    except (UserError, OSError, ValueError):
        return None
    sections = [key for key, value in config.measured().items() if isinstance(value, dict)]
    return config if all(f"{section}:" in lines for section in sections) else None  # a run's names them all


def differences(there: TrainConfig, here: TrainConfig) -> str:
    """For messages: the settings in which two runs differ, of those that change the run itself."""
    measured, shown = (
        [flat(form) for form in forms]
        for forms in ((there.measured(), here.measured()), (there.to_dict(), here.to_dict()))
    )
    keys = [key for key in measured[0] | measured[1] if measured[0].get(key) != measured[1].get(key)]
    parts = [f"{key} ({shown[0].get(key)} there, {shown[1].get(key)} here)" for key in keys[:N_SHOWN]]
    parts += [f"{len(keys) - N_SHOWN} more"] if len(keys) > N_SHOWN else []
    return ", ".join(parts) or f"a file that one of its keys names has changed since ({', '.join(FILE_KEYS)})"


def _first_lines(run_dir: Path, n_steps: int) -> str:
    try:
        kept = [metrics for metrics in read_metrics(run_dir) if metrics.step <= n_steps]
    except (UserError, OSError):
        kept = []
    if [metrics.step for metrics in steps_of(kept)] != list(range(1, n_steps + 1)):
        file = run_dir / METRICS_FILE
        raise UserError(f"{file} is damaged: it must have all steps up to the newest checkpoint's, {n_steps}")
    return "".join(map(line_of, kept))
