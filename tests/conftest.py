"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

# Tests of small tensors gain nothing from threads, and lose much where a neighbour keeps a core busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from omegaconf import OmegaConf

from llama_ft.config import DataConfig, ModelConfig, TrainConfig

CHECKOUT = Path(__file__).resolve().parent.parent


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a command of the checkout's package; a PYTHONPATH in `extra` comes first."""
    variables = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "COLUMNS")}
    variables |= extra or {}
    paths = [(extra or {}).get("PYTHONPATH"), str(CHECKOUT)]
    return variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(*args: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run `python -m ARGS` in the folder `cwd` to its end."""
    command = [sys.executable, "-m", *args]
    return subprocess.run(
        command, cwd=cwd, env=environment(env), timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data: Alpaca records and LLaMA-2's tokenizer. Not part of the project."""
    folder = Path(os.environ.get("LLAMA_FT_TEST_DATA") or CHECKOUT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; LLAMA_FT_TEST_DATA names its folder")
    return folder


@pytest.fixture
def tiny_config() -> TrainConfig:
    """The default config: the built-in model and data."""
    model = OmegaConf.load(CHECKOUT / "conf" / "model" / "tiny.yaml")
    return TrainConfig(model=ModelConfig(**model), data=DataConfig(name="sample"))
