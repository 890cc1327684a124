"""Compiled layers against the same layers as they are."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run
from helpers.models import relative
from helpers.planning import small_config
from helpers.training import gradients, ragged_samples, step_in

from llama_ft.config import OptimConfig
from llama_ft.records.result import read_result
from llama_ft.training.compilation import compile_layers
from llama_ft.training.loop import Windows

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++"),
    # Of PyTorch's own making.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("optim", "packing"),
    [(OptimConfig(), None), (OptimConfig(lora=True, gc=True, neft=True), 70)],
    ids=["full", "lora_gc_neft_packed"],
)
def test_compiled_layers_give_the_same_gradients(optim: OptimConfig, packing: int | None) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    config = small_config()
    config.model = replace(config.model, qkv_bias=True, qk_norm=packing is None)
    step = step_in(config, optim, torch.float32)
    windows = list(Windows(ragged_samples(), 1, 4, packing=packing).epoch(0))
    expected = [gradients(step, window) for window in windows]
    compile_layers(step.model, is_packed=packing is not None)
    found = [gradients(step, windows[0])]
    n_graphs = counters["stats"]["unique_graphs"]
    found += [gradients(step, window) for window in windows[1:]]
    assert n_graphs > 0
    assert packing or not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == n_graphs  # other lengths need no others
    for a, b in zip(found, expected, strict=True):
        assert max(map(relative, a, b)) <= 5e-6


@pytest.mark.process
def test_a_run_with_mixed_precision_is_compiled_before_it_is_timed(tmp_path: Path) -> None:
    keys = ["optim=mp_lora", "training.compile=true", "training.max_samples=16", "tracker=disabled"]
    done = run("llama_ft.train", *keys, "training.save=false", "hydra.run.dir=run", cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    said = [done.stdout.index(words) for words in ("compiling the layers", "1/2", "ok: peak")]
    assert said == sorted(said)
    result = read_result(tmp_path / "run")
    assert result is not None
    assert result.compiled
    assert (result.runtime_s or 0) < 5  # compiling takes longer
