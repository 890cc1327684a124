"""The memory of runs over several processes: real ones against the plan of one card, and against what is there."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT
from helpers.parallel_memory import LENGTHS, N, Case, samples
from helpers.planning import card

from llama_ft.bitsandbytes import is_installed
from llama_ft.config import ParallelConfig, Strategy, TrainConfig
from llama_ft.model.weights import build
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.fit import fewest_cards, reserved_mib
from llama_ft.planning.gpu_traits import Traits, traits_of
from llama_ft.planning.operators import binding, bound_by_resource, bytes_of, least_seconds, sent_of
from llama_ft.planning.predict import predict
from llama_ft.planning.run_costs import run_costs

CPU = Traits(on_cuda=False, has_bf16=True)
CASES = [
    *[Case("fsdp", techniques) for techniques in ("", "lora", "mp", "gc", "ga", "ga mp lora gc")],
    Case("fsdp", "mp gc", micro_batch_size=4),
    Case("fsdp", "mp lora", packing=100),
    *[Case("ddp", techniques) for techniques in ("", "ga", "mp lora gc")],
    *[Case(strategy, "ga mp lora gc", frozen_weights="nf4") for strategy in ("fsdp", "ddp") if is_installed()],
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[Any], list[Any]]]:
    """Of each process what it found of each case."""
    file = tmp_path_factory.mktemp("cases") / "cases.json"
    file.write_text(json.dumps([asdict(case) for case in CASES]))
    tests = CHECKOUT / "tests"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={N}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(tests)])}
    worker = [str(tests / "helpers" / "parallel_memory.py"), str(file)]
    ended = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(N)]


@cache
def planned(case: Case) -> Any:
    return fake_run(case.config, samples(), CPU).use


@pytest.mark.process
@pytest.mark.parametrize("number", range(len(CASES)), ids=map(repr, CASES))
def test_the_plan_of_a_card_is_what_its_process_needs(measured: Any, number: int) -> None:
    use = asdict(planned(CASES[number]))
    first, others = measured[0][0][number], [uses[number] for uses, _ in measured[1:]]
    assert first == json.loads(json.dumps(use))  # to the byte: phase, categories and dtypes
    for other in others:  # they have as many rows, or fewer
        assert 0.95 * use["peak_mib"] <= other["peak_mib"] <= use["peak_mib"]


@pytest.mark.process
@pytest.mark.parametrize("number", range(len(CASES)), ids=map(repr, CASES))
def test_what_is_tracked_is_there(measured: Any, number: int) -> None:
    for _, held in measured:
        for n_bytes, tracked in held[number].values():
            assert n_bytes > 0
            assert tracked == pytest.approx(n_bytes, rel=0.05)
