"""`result.json`: what a run leaves behind, however it ends. Knows nothing of torch, so that any command can read it."""

import json
import re
from pathlib import Path
from typing import Any

from llama_ft.config import TrainConfig, UserError
from llama_ft.files import write_text

SCHEMA_VERSION = 1
RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"
STATUSES = ("ok", "oom", "killed", "interrupted", "error")
CATEGORIES = ("parameter", "gradient", "optimizer_state", "activation", "other")
MIB = 2**20

# Said by PyTorch on the CPU, by CUDA, by C++ code that nothing catches, and by the loader of shared libraries.
OUT_OF_MEMORY_TEXT = re.compile(
    r"can't allocate memory|not enough memory|CUDA out of memory|MemoryError|bad_alloc|[Cc]annot allocate memory"
    r"|failed to map segment|CUDA error: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
)

_KNOWN = (
    "schema_version status error config_hash combination model data gpu optim techniques micro_batch_size"
    " memory_limit_mib command"
).split()
_MEASURED = (
    "device runtime_s samples tokens tokens_per_s peak_memory_mib peak_memory_reserved_mib peak_rss_mib memory_mib"
    " memory_max_mib peak_phase ledger trainable_params total_params trainable_percent loss_first loss_last"
    " train_loss_before train_loss_after compute_dtype skipped_steps resumed_at_step versions"
).split()


def new_result(config: TrainConfig, command: str) -> dict[str, Any]:
    """A result in which everything that is measured is still null."""
    return _from_settings(config.to_dict(), command) | {
        "config_hash": config.hash(),
        "settings_hash": config.hash(without=("optim",)),  # equal for runs that differ in their techniques alone
        "memory_limit_mib": config.memory_limit_mib,
    }


def refused_result(settings: dict[str, Any], command: str, error: str) -> dict[str, Any]:
    """The result of a run that never began, since a value in its config is not allowed."""
    return _from_settings(settings, command) | {"error": error}


def _from_settings(settings: dict[str, Any], command: str) -> dict[str, Any]:
    known = {
        "schema_version": SCHEMA_VERSION,
        "status": "error",
        "combination": "_".join(name for name, on in settings["optim"].items() if on) or "baseline",
        "model": settings["model"]["name"],
        "data": settings["data"]["name"],
        "gpu": settings["gpu"]["name"],
        "optim": settings["optim"],
        "techniques": {name: settings[name] for name in settings["optim"]},
        "micro_batch_size": settings["training"]["micro_batch_size"],
        "command": command,
    }
    return dict.fromkeys((*_KNOWN, *_MEASURED)) | known


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write `result.json` atomically."""
    write_text(run_dir / RESULT_FILE, json.dumps(result, indent=2) + "\n")


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The folder's result; None if it has none.

    Raises:
        UserError: if the file is no result of this program.
    """
    file = run_dir / RESULT_FILE
    if not file.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    complete = isinstance(result, dict) and result.keys() >= set(_KNOWN)
    if not complete or result["schema_version"] != SCHEMA_VERSION or result["status"] not in STATUSES:
        raise UserError(f"{file} is not a result that this version writes (schema_version {SCHEMA_VERSION})")
    return dict.fromkeys(_MEASURED) | result  # earlier versions measured less


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last one that was cut short is left out.

    Raises:
        UserError: naming the first other line that is damaged.
    """
    file = run_dir / METRICS_FILE
    if not file.is_file():
        return []
    metrics = []
    for number, text in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise UserError(
                f"{file}, line {number}: this is not a step that `train` writes; delete the line, or the file"
            )
        metrics.append(line)
    return metrics
