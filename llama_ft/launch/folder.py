"""What a run's folder holds before the run begins."""

from pathlib import Path

from llama_ft.config import TrainConfig, UserError
from llama_ft.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, WEIGHTS_FILE, write_text
from llama_ft.records.metrics import METRICS_FILE, parse_line
from llama_ft.records.result import CONFIG_FILE, LOG_FILE, RESULT_FILE
from llama_ft.training.position import N_KEPT, checkpoints, read_state, remove_older


def clear(run_dir: Path, config: TrainConfig) -> None:
    """Remove what an earlier run left behind; if it is to be resumed, only what is newer than its checkpoint.

    Raises:
        UserError: if the checkpoint is of another configuration, the metrics before it are missing, or there are
            weights that no run wrote.
    """
    trained = (ADAPTER_FILE, ADAPTER_CONFIG_FILE, WEIGHTS_FILE)
    foreign = [name for name in trained if (run_dir / name).exists()]
    if foreign and not (run_dir / CONFIG_FILE).exists():
        raise UserError(f"{run_dir} holds {foreign[0]}, which no run wrote: name another folder with hydra.run.dir=DIR")
    remove_older(run_dir, N_KEPT if config.training.resume else 0)
    if found := checkpoints(run_dir):
        _trim(run_dir / METRICS_FILE, read_state(found[-1], config.hash()).position.step)
    else:
        (run_dir / METRICS_FILE).unlink(missing_ok=True)
    for stale in (RESULT_FILE, LOG_FILE, *trained):
        (run_dir / stale).unlink(missing_ok=True)
    for written in (RESULT_FILE, CONFIG_FILE, METRICS_FILE, *trained):
        for leftover in run_dir.glob(f".{written}.*.tmp"):
            leftover.unlink()


def _trim(metrics_file: Path, n_steps: int) -> None:
    """Keep the first lines, those of the steps that a checkpoint holds."""
    lines = metrics_file.read_bytes().splitlines(keepends=True)[:n_steps] if metrics_file.exists() else []
    try:
        steps = [parse_line(line, str(metrics_file)).step for line in lines]
    except UserError:
        steps = []
    if steps != list(range(1, n_steps + 1)):
        raise UserError(
            f"{metrics_file} is damaged: it should have the steps up to {n_steps}, as the newest checkpoint"
        )
    write_text(metrics_file, b"".join(lines).decode())
