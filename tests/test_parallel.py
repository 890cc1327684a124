"""A run split over processes computes what one process computes, and goes on with any number of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, run
from helpers.models import relative
from helpers.split_steps import Case, config_of, outcome

from llama_ft.config import UserError
from llama_ft.launch.meeting import check_gpus
from llama_ft.model.formats import permute_rotary
from llama_ft.model.stored import in_memory, permuted
from llama_ft.system import n_cores

pytestmark = pytest.mark.process
N_STEPS = 3  # of an epoch: of 9 samples 3 are held out
COMBINATIONS = [[], ["ga"], ["lora"], ["gc"], ["ga", "lora", "gc"], ["mp"], ["ga", "mp"], ["ga", "mp", "lora", "gc"]]
CASES: list[Case] = [
    *({"optim": optim} for optim in COMBINATIONS),
    {"optim": ["ga"], "size": 1},  # of the last window's 3 samples the fourth process has none
    {"optim": [], "size": 1},  # all processes but the first have none
    {"optim": ["ga"], "packing": 40},
    {"optim": ["ga"], "model": {"tie_word_embeddings": True}},
    {"optim": ["ga"], "model": {"qk_norm": True, "qkv_bias": True}},
    {"optim": ["ga"], "optimizer": "sgd"},
    {"optim": ["ga", "mp"], "compute": "fp16"},
    {"optim": ["ga"], "fp64": True},
    {"optim": ["lora", "gc"], "fp64": True},
    {"optim": ["ga", "mp", "lora"], "frozen": "nf4"},
]


def tolerance(case: Case) -> float:
    """Of a 16-bit product's sum the rounding depends on which samples are summed together."""
    return 1e-12 if case.get("fp64") else 2e-2 if "mp" in case["optim"] else 5e-6


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return [outcome(case | {"strategy": "none"}) for case in CASES]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_split_steps_have_the_gradients_of_whole_ones(tmp_path: Path, alone, strategy: str, n: int) -> None:
    cases, found = tmp_path / "cases.json", tmp_path / "found.pt"
    cases.write_text(json.dumps([case | {"strategy": strategy} for case in CASES]))
    command = ["torch.distributed.run", "--nproc-per-node", str(n), "-m", "helpers.split_steps", str(cases), str(found)]
    done = run(*command, cwd=CHECKOUT / "tests", env={"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for case, one, split in zip(CASES, alone, torch.load(found, weights_only=True), strict=True):
        apart = tolerance(case)
        assert split["gradients"].keys() == one["gradients"].keys() != set(), case
        for name, gradient in split["gradients"].items():
            assert relative(gradient, one["gradients"][name]) <= apart, (case, name)
        assert split["losses"][0] == pytest.approx(one["losses"][0], rel=min(apart, 1e-6)), case
        assert split["norms"][0] == pytest.approx(one["norms"][0], rel=apart), case
        assert split["losses"] == pytest.approx(one["losses"], rel=max(100 * apart, 1e-5)), case
        assert split["held_out"][0] == pytest.approx(one["held_out"][0], rel=max(100 * apart, 1e-5)), case
        if strategy == "fsdp":  # rows are rounded up
            assert one["bytes"] / n <= split["bytes"] <= 1.1 * one["bytes"] / n, case


def train(folder: Path, *arguments: str) -> dict[tuple[str, int], float]:
    """The losses in a run's folder after a command, held-out ones too, by their steps."""
    told = ["training.micro_batch_size=2", "training.max_samples=9", "tracker=disabled", *arguments]
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    done = run("llama_ft.train", *told, f"hydra.run.dir={folder}", cwd=folder.parent, timeout=200, env=no_gpu)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(key, line["step"]): line[key] for line in lines for key in ("loss", "eval_loss") if key in line}


@pytest.mark.parametrize("optim", ["baseline", "mp_lora"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, optim: str) -> None:
    """Begun on 2, resumed on 4, then on 1, and on 2 again; the files that it leaves are those of any run."""
    shared = [f"optim={optim}", "lora.dropout=0", "training.schedule=constant", "training.warmup_ratio=0"]
    shared += ["training.save_every=4", "training.resume=true", "data.validation=3", "training.eval_every=2"]
    whole = train(tmp_path / "whole", *shared, "training.epochs=4")
    for epochs, n in enumerate((2, 4, 1, 2), 1):
        split = ["parallel=fsdp", f"parallel.processes={n}"] if n > 1 else []
        losses = train(folder := tmp_path / "split", *shared, *split, f"training.epochs={epochs}")
        resumed = json.loads((folder / "result.json").read_text())["resumed_at_step"]
        assert resumed == (N_STEPS * (epochs - 1) or None)
    assert {key for key, _ in whole} == {"loss", "eval_loss"}
    losses = {key: losses[key] for key in whole}  # it was evaluated at each of its ends too
    assert losses == pytest.approx(whole, rel=1e-5 if optim == "baseline" else 1e-2)
    kept = {path.name for path in folder.iterdir()} - {"train.log"}
    assert kept == {path.name for path in (tmp_path / "whole").iterdir()} - {"train.log"}


@pytest.mark.parametrize("rows", [range(0, 5), range(7, 40), range(90, 96), range(96, 96)])
def test_a_process_reads_no_piece_without_rows_of_its_own(monkeypatch: pytest.MonkeyPatch, rows: range) -> None:
    """Of a weight in one file, in several, and in Hugging Face's rotary layout; what it reads is right."""
    monkeypatch.setattr("llama_ft.model.mapped.PIECE_ELEMENTS", 16)
    tensor = torch.arange(96.0 * 4).view(96, 4)
    weight = in_memory(tensor)
    for read, truth in ((weight, tensor), (permuted(weight, 12, to_hf=True), permute_rotary(tensor, 8, to_hf=True))):
        found = dict(read.pieces(1, rows))
        for first, piece in found.items():
            assert first < rows.stop
            assert rows.start < first + len(piece)
            assert torch.equal(piece, truth[first : first + len(piece)])
        assert set(rows) <= {first + n for first, piece in found.items() for n in range(len(piece))}


def test_far_more_processes_than_cores_are_refused() -> None:
    """They would take all of the machine's memory before one of them computes."""
    config = config_of({"strategy": "ddp", "optim": []})
    config.parallel.processes = 1000 * n_cores()
    with pytest.raises(UserError, match=r"give at most \d+"):
        check_gpus(config)
