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
ADAPTER_FILE = "adapter.safetensors"
WEIGHTS_FILE = "model.safetensors"  # as the model's loader expects it
STATUSES = ("ok", "oom", "killed", "interrupted", "error")
CATEGORIES = ("parameter", "gradient", "optimizer_state", "activation", "other")
MB = 2**20

# Said by PyTorch on the CPU, by CUDA, by C++ code that nothing catches, and by the loader of shared libraries.
OUT_OF_MEMORY_TEXT = re.compile(
    r"can't allocate memory|not enough memory|CUDA out of memory|MemoryError|bad_alloc|[Cc]annot allocate memory"
    r"|failed to map segment|CUDA error: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
)

_KNOWN = (
    "schema_version status error config_hash combination model data gpu optim techniques batch_size memory_limit_mb"
    " command"
).split()
_MEASURED = (
    "device runtime_s samples tokens tokens_per_s peak_memory_mb peak_memory_reserved_mb peak_rss_mb memory_mb"
    " memory_max_mb memory_instant ledger trainable_params total_params trainable_percent loss_first loss_last"
    " eval_loss_before eval_loss_after versions"
).split()


def new_result(config: TrainConfig, command: str) -> dict[str, Any]:
    """A result in which everything that is measured is still null."""
    settings = config.to_dict()
    known: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "status": "error",
        "error": None,
        "config_hash": config.hash(),
        "settings_hash": config.hash(without=("optim",)),  # equal for runs that differ in their techniques alone
        "combination": config.optim.combination,
        "model": config.model.name,
        "data": config.data.name,
        "gpu": config.gpu.name,
        "optim": settings["optim"],
        "techniques": {name: settings[name] for name in settings["optim"]},
        "batch_size": config.training.batch_size,
        "memory_limit_mb": config.measure.memory_limit_mb,
        "command": command,
    }
    return known | dict.fromkeys(_MEASURED)


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
    complete = isinstance(result, dict) and result.keys() >= {*_KNOWN, *_MEASURED}
    if not complete or result["schema_version"] != SCHEMA_VERSION or result["status"] not in STATUSES:
        raise UserError(f"{file} is not a result that this version writes (schema_version {SCHEMA_VERSION})")
    return result
