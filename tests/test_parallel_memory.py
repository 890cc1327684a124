"""The memory of runs over several processes: real ones against the plan of one card, and against what is there."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
from conftest import CHECKOUT
from helpers.parallel_memory import LENGTHS, Case, N, samples
from helpers.planning import ON_CPU, ON_CUDA, card

from llama_ft.bitsandbytes import is_installed
from llama_ft.config import OptimConfig, ParallelConfig, Strategy, TrainConfig
from llama_ft.config.groups import MatrixRates
from llama_ft.model.weights import build
from llama_ft.planning import fit
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.fit import fewest_cards, reserved_mib
from llama_ft.planning.operators import sent_of
from llama_ft.planning.predict import predict
from llama_ft.planning.run_costs import run_costs
from llama_ft.records.plan import PlanRow

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
    return fake_run(case.config, samples(), ON_CPU).use


@pytest.mark.process
@pytest.mark.parametrize("number", range(len(CASES)), ids=map(repr, CASES))
def test_the_plan_of_a_card_is_what_its_process_needs(measured: Any, number: int) -> None:
    use = asdict(planned(CASES[number]))
    first, others = measured[0][0][number], [uses[number] for uses, _ in measured[1:]]
    if CASES[number].strategy == "ddp":  # its weights come in another order: what is alive beside the buckets differs
        assert first.pop("max_mib") == pytest.approx(use.pop("max_mib"), rel=0.05)
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


def on(config: TrainConfig, strategy: str, processes: int) -> TrainConfig:
    return replace(config, parallel=ParallelConfig(Strategy[strategy], processes=processes))


def test_fsdp_gives_each_process_its_share() -> None:
    config = Case("fsdp").config
    alone = fake_run(replace(config, parallel=ParallelConfig()), samples(), ON_CPU).use
    assert alone.max_mib["gathered"] == 0
    for n in (2, 4):
        split = fake_run(on(config, "fsdp", n), samples(), ON_CPU).use
        for category in ("parameter", "gradient", "optimizer_state"):
            assert split.max_mib[category] == pytest.approx(alone.max_mib[category] / n, rel=0.03)
        assert split.max_mib["gathered"] > 0


@pytest.mark.parametrize("n", [2, 4])
def test_what_is_sent_is_that_of_a_ring(n: int) -> None:
    config = Case("fsdp").config
    n_bytes, share = sum(each.nbytes for each in build(config.model).parameters()), (n - 1) / n
    loss = 2 * share * 4

    def sent(strategy: str) -> float:
        (costs,) = run_costs([on(config, strategy, n)], samples(), ON_CPU)
        return sent_of(costs.operators) / costs.steps

    assert sent("ddp") == pytest.approx(2 * share * n_bytes + loss)
    # Weights are gathered in the forward and in the backward pass, rounded up to as many rows for each.
    assert sent("fsdp") == pytest.approx(3 * share * n_bytes, rel=0.03)


@cache
def rows(link_gb_s: float | None) -> list[PlanRow]:
    rates = MatrixRates(100.0, 100.0, 100.0, 100.0)
    gpu = replace(card(memory_mib=1000), bandwidth_gb_s=1000.0, link_gb_s=link_gb_s, tflops=rates)
    config = Case("fsdp", micro_batch_size=4).config
    return predict([replace(config, parallel=ParallelConfig()), on(config, "fsdp", 4)], [gpu], LENGTHS)


def test_a_slow_link_binds() -> None:
    (alone, quick), (_, slow), (same, unknown) = rows(1e6), rows(1e-3), rows(None)
    assert (alone.parallel, alone.sent_mib) == (None, None)
    assert alone.runtime_s == same.runtime_s
    assert quick.parallel == {"strategy": "fsdp", "processes": 4}
    assert quick.binds != "communication"
    assert quick.bound_s
    assert slow.bound_s
    assert quick.runtime_s == sum(s for name, s in quick.bound_s.items() if name != "communication")
    assert slow.binds == "communication"
    assert slow.runtime_s == slow.bound_s["communication"]
    assert slow.runtime_s == pytest.approx((slow.sent_mib or 0) * 2**20 * (slow.steps or 0) / 1e6)
    assert unknown.runtime_s is None
    assert unknown.sent_mib == quick.sent_mib
    assert quick.flops
    assert alone.flops
    assert sum(quick.flops.values()) == pytest.approx(sum(alone.flops.values()) / 4, rel=0.1)


def test_the_fewest_cards_are_named() -> None:
    model = replace(Case("fsdp").config.model, dim=1024, n_heads=8, ffn_dim=4096)
    config = replace(Case("fsdp").config, model=model, parallel=ParallelConfig(), optim=OptimConfig(mp=True, gc=True))
    needs = {n: reserved_mib(on(config, "fsdp", n), LENGTHS, ON_CUDA, 0) for n in (2, 4, 8)}
    assert needs[2] > needs[4] > needs[8]
    for n in (4, 8):
        assert fewest_cards(config, LENGTHS, ON_CUDA, 0, needs[n]) == n
        assert fewest_cards(on(config, "fsdp", n), LENGTHS, ON_CUDA, 0, needs[n]) != n  # it has as many
    assert fewest_cards(config, LENGTHS, ON_CUDA, 0, 1.0) is None


def test_a_refusal_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "fewest_cards", lambda *_: 4)
    config = replace(Case("fsdp").config, parallel=ParallelConfig())
    why = fit.objection(config, LENGTHS, fit.Capacity(1, 0, "this card has 1"), ON_CUDA, 0)
    assert why is not None
    assert re.search(
        r"; on 4 such cards optim=\S+ (\S+ )*parallel=fsdp parallel.processes=4 would fit; plan.enf", why
    ), why
