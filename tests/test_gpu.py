"""What only a GPU can show: the same results as on the CPU, the allocator's peaks, caps, no waiting within a step."""

import json
import os

import pytest
import torch
from conftest import run
from helpers.models import relative, small_model
from helpers.training import ragged_samples

from llama_ft.config import MixedPrecisionConfig
from llama_ft.data.collate import collate
from llama_ft.techniques.mixed_precision import Precision, mixed_precision
from llama_ft.training.step import TrainStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]


GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}


def step_on(device: str, precision: Precision) -> TrainStep:
    model = small_model(2).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return TrainStep(model, optimizer, precision)


def test_losses_equal_those_on_the_cpu() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    window = [collate(ragged_samples())]
    losses = []
    for device in ("cpu", "cuda"):
        step = step_on(device, Precision(device))
        losses.append([step(window)[0].item() for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_logits_equal_those_on_the_cpu() -> None:
    model, tokens = small_model(2), torch.arange(40)[None]
    with torch.no_grad():
        assert relative(small_model(2).cuda()(tokens.cuda()).cpu(), model(tokens)) <= 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(precision: str) -> None:
    chosen = Precision("cuda")
    if precision != "fp32":
        chosen = mixed_precision(MixedPrecisionConfig(), "cuda", has_bf16=precision == "bf16")
    step, window = step_on("cuda", chosen), [collate([sample]).pinned() for sample in ragged_samples()]
    step(window)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(window)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("combination", ["baseline", "ga_mp_lora"])
def test_a_run_reports_the_allocators_peaks_by_category(tmp_path, combination: str) -> None:
    arguments = [f"optim={combination}", "training.max_samples=16", "tracker=disabled", f"hydra.run.dir={tmp_path}/run"]
    done = run("llama_ft.train", *arguments, cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["peak_memory_reserved_mib"] >= result["peak_memory_mib"] > 0
    assert sum(result["memory_mib"].values()) == pytest.approx(result["peak_memory_mib"])


@pytest.mark.parametrize("combination", ["baseline", "mp", "ga_mp_lora"])
def test_a_plan_says_what_the_allocator_will_say(tmp_path, combination: str) -> None:
    """On a model whose tensors are far larger than what kernels allocate for themselves."""
    told = [f"optim={combination}", "model.dim=768", "model.ffn_dim=2048", "checkpoint=random", "data.first=16"]
    done = run("llama_ft.train", *told, "tracker=disabled", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    done = run("llama_ft.plan", *told, f"output={tmp_path}/plan", cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "plan" / "plan.json").read_text())["rows"]
    assert row["peak_memory_mib"] == pytest.approx(result["peak_memory_mib"], rel=0.05)
    assert row["reserved_mib"] == pytest.approx(result["peak_memory_reserved_mib"], rel=0.1)


def test_a_limit_makes_a_run_end_out_of_memory(tmp_path) -> None:
    arguments = [
        "measure.memory_limit_mib=20",
        "plan.enforce=false",
        "tracker=disabled",
        f"hydra.run.dir={tmp_path}/run",
    ]
    done = run("llama_ft.train", *arguments, cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "oom"


def test_a_cards_profile_brings_its_memory_and_its_16_bit_format(tmp_path) -> None:
    arguments = ["optim=ga_mp_lora", "gpu=t4_16gb", "training.max_samples=16", "tracker=disabled"]
    done = run("llama_ft.train", *arguments, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["gpu"], result["compute_dtype"]) == ("t4_16gb", "float16")
    assert result["memory_limit_mib"] == 14773


def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path) -> None:
    losses = {}
    for name, extra in {"whole": [], "saved": ["training.save_every=3"]}.items():
        arguments = ["optim=mp_lora", "training.max_samples=8", "training.micro_batch_size=1", "tracker=disabled"]
        arguments.append(f"hydra.run.dir={tmp_path}/{name}")
        done = run("llama_ft.train", *arguments, *extra, cwd=tmp_path, env=GPU)
        assert done.returncode == 0, done.stdout + done.stderr
        if name == "saved":  # as if it had been killed after its sixth step
            (tmp_path / name / "result.json").unlink()
            done = run("llama_ft.train", *arguments, "training.resume=true", cwd=tmp_path, env=GPU)
            assert "resuming after optimizer step 6" in done.stdout
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["saved"] == pytest.approx(losses["whole"], rel=1e-3)
