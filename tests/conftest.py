"""What several test files share."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Tests of small tensors gain nothing from threads, and lose much where a neighbor keeps a core busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The CPU's figures are what these tests know; those of the GPU have a file of their own, to be run by itself. The
# processes that pytest starts to test side by side do not know its arguments, and have its environment.
if "PYTEST_XDIST_WORKER" not in os.environ and not any("test_gpu.py" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from omegaconf import OmegaConf

from llama_ft.config import DataConfig, ModelConfig, TrainConfig

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def kernels_of_runs() -> None:
    """Those of a run, in all tests: whichever test first loads a model would else change the others' last digits."""
    import torch

    from llama_ft.kernels import use_training_kernels

    use_training_kernels(torch.device("cpu"))


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a command of the checkout; a PYTHONPATH in `extra` comes before the checkout."""
    variables = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "COLUMNS")}
    variables |= {"CUDA_VISIBLE_DEVICES": ""} | (extra or {})
    paths = [(extra or {}).get("PYTHONPATH"), str(CHECKOUT)]
    return variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(
    *args: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGS` in the folder `cwd` to its end."""
    return subprocess.run(
        [sys.executable, "-m", *args],
        cwd=cwd,
        env=environment(env),
        timeout=timeout,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def injected(folder: Path, *, into: str, code: str) -> dict[str, str]:
    """Environment in which each Python process started with `into` among its arguments runs `code` first."""
    folder.mkdir(parents=True, exist_ok=True)
    body = "".join(f"    {line}\n" for line in code.splitlines())
    (folder / "sitecustomize.py").write_text(f"import sys\nif {into!r} in ' '.join(sys.orig_argv):\n{body}")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data: Alpaca records and LLaMA-2's tokenizer. Not part of the project."""
    folder = Path(os.environ.get("LLAMA_FT_TEST_DATA") or CHECKOUT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; LLAMA_FT_TEST_DATA names its folder")
    return folder


@pytest.fixture(scope="module")
def quick(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers that a quick run of the study leaves which the test's module imports as `study`."""
    from helpers.studies import quick_run

    return quick_run(request.module.study.STUDY, tmp_path_factory.mktemp("quick"))


@pytest.fixture
def tiny_config() -> TrainConfig:
    """The default config: the built-in model and data."""
    model = OmegaConf.load(CHECKOUT / "conf" / "model" / "tiny.yaml")
    return TrainConfig(model=ModelConfig(**model), data=DataConfig(name="sample"))


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been run."""

    folder: Path
    arguments: tuple[str, ...]
    process: subprocess.CompletedProcess[str]

    def results(self) -> dict[str, dict[str, Any]]:
        """The rows' results by folder name."""
        return {file.parent.name: json.loads(file.read_text()) for file in self.folder.glob("*/result.json")}


def run_sweep(cwd: Path, *args: str, folder: Path, env: dict[str, str] | None = None) -> Sweep:
    """Run `python -m llama_ft.train ARGS`, a sweep that goes into `folder`."""
    process = run("llama_ft.train", *args, cwd=cwd, env=env, timeout=300)
    return Sweep(folder, args, process)


@pytest.fixture(scope="session")
def limited_sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two rows under a memory limit that only LoRA's keeps, tracked by W&B offline."""
    cwd = tmp_path_factory.mktemp("limited")
    # 28 M parameters in fp32: a bare process of about 320 MiB, LoRA's within 550, full fine-tuning's beyond 750.
    size = (
        "checkpoint=random",
        "model.ffn_dim=8192",
        "measure.memory_limit_mib=650",
        "training.micro_batch_size=1",
        "training.max_samples=4",
    )
    sweep = ("-m", "optim=baseline,lora", f"hydra.sweep.dir={cwd / 'limited'}", "tracker.mode=offline")
    return run_sweep(cwd, *sweep, *size, folder=cwd / "limited")


@pytest.fixture
def small_config(tiny_config: TrainConfig) -> TrainConfig:
    """Two narrow layers, since 16-bit arithmetic is slow on many a CPU."""
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 96}
    return replace(tiny_config, model=replace(tiny_config.model, **sizes))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = "study_ plan_published convert upload tracking pretrain sample_data table1 experiments evaluate kv_cache"
    for item in items:
        if item.path.stem.removeprefix("test_").startswith(tuple(slow.split())):
            item.add_marker("slow")
