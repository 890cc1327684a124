"""Calibration: times made from known costs give these costs back, and what the runs do not tell gets no time.

`benchmarks/plan-time-cpu` holds real runs, from two of which the others are predicted.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT
from helpers.training import ragged_samples
from omegaconf import OmegaConf
from test_planning import ON_CPU, with_optim

from benchmarks.plan_time import compare
from llama_ft.config import DeviceChoice, GpuConfig, MatrixRates, TrainConfig, UserError
from llama_ft.data.dataset import load_data
from llama_ft.files import write_text
from llama_ft.planning.calibration import Measured, amounts, learn, measured, non_negative_fits, resources
from llama_ft.planning.calibration_runs import calibrate, is_of, learn_from, least_cost, runs_of
from llama_ft.planning.operators import bytes_of, flops_of, mapped_bytes_of
from llama_ft.planning.predict import combinations, predict
from llama_ft.planning.run_costs import run_costs, step_costs
from llama_ft.records.result import new_result, write_result

CPU = GpuConfig(name="cpu", device=DeviceChoice.cpu)
CARD = GpuConfig("card", DeviceChoice.cuda, 40_000, 500, "8.0", 1555.0, MatrixRates(19.5, 156.0, 312.0, 312.0))
PROCESSOR = "A processor, 2 threads"
COSTS = {"float32": 1e-11, "bfloat16": 4e-11, "bytes": 2e-10, "operators": 5e-5, "new blocks": 4e-10}


def time_of(used: dict[str, float], costs: dict[str, float]) -> float:
    return sum(amount * costs[name] for name, amount in used.items())


def made_up(name: str, table: Sequence[dict[str, float]], costs: dict[str, float]) -> Measured:
    """A run whose steps use these amounts, and take exactly as long as the costs say."""
    return Measured(name, torch.tensor([time_of(row, costs) for row in table], dtype=torch.float64), list(table))


def lines_of(seconds: Sequence[float]) -> list[dict[str, Any]]:
    """metrics.jsonl of steps that take so long."""
    ends = torch.tensor(seconds, dtype=torch.float64).cumsum(0).tolist()
    return [{"step": number, "time_s": end} for number, end in enumerate(ends, 1)]


def step_times(config: TrainConfig, costs: dict[str, float], gpu: GpuConfig = CPU) -> list[float]:
    parts, shares = step_costs(config, ragged_samples(), ON_CPU)
    each = torch.tensor([time_of(resources(gpu, part), costs) for part in parts], dtype=torch.float64)
    return list((shares @ each).tolist())


# What a step costs


@pytest.mark.parametrize("toggles", [(False, False, False, False), (True, True, False, False)])
def test_the_steps_of_a_run_are_the_run(small_config: TrainConfig, toggles: tuple[bool, ...]) -> None:
    config = with_optim(replace(small_config, model=replace(small_config.model, n_layers=3)), toggles)
    config.ga.steps, config.training.epochs = 3, 2
    parts, shares = step_costs(config, ragged_samples(), ON_CPU)
    (costs,) = run_costs([config], ragged_samples(), ON_CPU)
    assert len(shares) == costs.steps
    times_each = shares.sum(0).tolist()
    for count in (bytes_of, mapped_bytes_of, lambda operators: sum(operators.values())):
        found = sum(n * count(part) for n, part in zip(times_each, parts, strict=True))
        assert found == pytest.approx(count(costs.operators))
    dtype = "bfloat16" if config.optim.mp else "float32"
    found = sum(n * flops_of(part).get(dtype, 0.0) for n, part in zip(times_each, parts, strict=True))
    assert {dtype: pytest.approx(found)} == flops_of(costs.operators)


def test_new_large_blocks_are_those_of_32_mib(small_config: TrainConfig) -> None:
    vocabulary = replace(small_config.model, vocab_size=2**18)  # an embedding and a head of 64 MiB each
    (large,) = run_costs([replace(small_config, model=vocabulary)], ragged_samples(), ON_CPU)
    # Both have a gradient each step, which is written once; logits of up to 36 targets are 36 MiB more.
    least = 2 * 4 * 2**18 * small_config.model.dim * large.steps
    assert least <= mapped_bytes_of(large.operators) <= 1.5 * least


# Costs from times


def test_two_runs_give_the_costs_back_and_predict_the_others(small_config: TrainConfig) -> None:
    small_config.ga.steps = 3
    runs = []
    for toggles in ((False, False, False, False), (True, True, False, False)):
        config = with_optim(small_config, toggles)
        lines = lines_of(step_times(config, COSTS))
        runs.append(measured("run", config, ragged_samples(), CPU, 0.0, lines))
    learned = learn(runs)
    for name, cost in learned.cost.items():
        assert cost == pytest.approx(COSTS[name], rel=1e-4)
    for toggles in ((False, False, True, False), (False, True, False, True)):
        (costs,) = run_costs([with_optim(small_config, toggles)], ragged_samples(), ON_CPU)
        used = resources(CPU, costs.operators)
        assert learned.seconds(used) == pytest.approx(time_of(used, COSTS), rel=1e-4)


def test_costs_of_new_blocks_too() -> None:
    generator = torch.Generator().manual_seed(1)
    tables = [torch.rand(12, 5, generator=generator).tolist() for _ in range(2)]
    sizes = {"float32": 1e11, "bfloat16": 1e11, "bytes": 1e9, "operators": 1e3, "new blocks": 1e9}
    rows = [
        [{name: x * size for x, (name, size) in zip(row, sizes.items(), strict=True)} for row in table]
        for table in tables
    ]
    learned = learn([made_up(str(number), table, COSTS) for number, table in enumerate(rows)])
    assert learned.cost == pytest.approx(COSTS)


def test_non_negative_least_squares_meets_its_conditions() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        table = torch.rand(15, 4, generator=generator, dtype=torch.float64)
        target = torch.randn(15, generator=generator, dtype=torch.float64)
        found = non_negative_fits(table, target)[0].cost
        gradient = table.T @ (table @ found - target)  # Karush-Kuhn-Tucker: 0 where found > 0, else not negative
        assert found.min() >= 0
        assert gradient.min() > -1e-9
        assert float((gradient * found).abs().max()) < 1e-9


def test_efficiencies_where_the_profile_has_rates(small_config: TrainConfig) -> None:
    slower = {"memory": 1 / 0.8, "fp32": 1 / 0.4, "operators": 2e-6}
    rows = [{"memory": 1.0, "fp32": x, "operators": 1e5 * x * x} for x in (0.5, 1.0, 2.0, 4.0)]
    learned = learn([made_up("run", rows, slower)], lambda name: least_cost(name, CARD))
    assert learned.cost == pytest.approx(slower)
    faster = {"memory": 0.5, "fp32": 2.0, "operators": 2e-6}
    learned = learn([made_up("run", rows, faster)], lambda name: least_cost(name, CARD))
    assert learned.cost["memory"] == 1.0  # no card is faster than its own memory
    row = {"flops": {"float32": 1e15}, "bytes_moved": 1e12, "mapped_bytes": 1e9, "operators": 7.0}
    bound_s = {"memory": 1.0, "fp32": 2.0}
    assert amounts(CARD, row["flops"], 1e12, 1e9, bound_s, 7.0) == bound_s | {"operators": 7.0}  # type: ignore[arg-type]


# What the runs do not tell


def test_a_format_that_no_run_used_has_no_time() -> None:
    rows = [{"float32": 1e9 * x, "bytes": 1e8 * x * x, "operators": 900.0} for x in (1.0, 2.0, 3.0, 5.0)]
    learned = learn([made_up("run", rows, COSTS)])
    assert learned.seconds(rows[0]) == pytest.approx(time_of(rows[0], COSTS))
    with pytest.raises(UserError, match="none of the runs used matrix products in bfloat16"):
        learned.seconds(rows[0] | {"bfloat16": 1e6})


def test_what_always_went_together_is_not_told_apart() -> None:
    rows = [{"float32": 1e9 * x, "bytes": 1e8, "operators": 900.0} for x in (1.0, 2.0, 3.0, 5.0)]
    learned = learn([made_up("run", rows, COSTS)])
    half = {"float32": 5e8, "bytes": 5e7, "operators": 450.0}
    assert learned.seconds(half) == pytest.approx(time_of(half, COSTS))
    with pytest.raises(UserError, match="do not tell apart"):
        learned.seconds({"float32": 1e9, "bytes": 2e7, "operators": 900.0})


def test_a_cost_too_small_to_be_seen_is_not_taken_for_none() -> None:
    costs = COSTS | {"bytes": 0.0}
    rows = [{"float32": 1e9 * x, "bytes": 1e8 * x * x, "operators": 900.0} for x in (1.0, 2.0, 3.0, 5.0)]
    learned = learn([made_up("run", rows, costs)])
    assert learned.cost["bytes"] == pytest.approx(0.0, abs=1e-14)
    learned = replace(learned, fits=[fit for fit in learned.fits if not fit.cost[1]])
    assert learned.seconds(rows[3]) == pytest.approx(time_of(rows[3], costs))
    with pytest.raises(UserError, match="bytes moved cost nothing that could be seen"):
        learned.seconds(rows[3] | {"bytes": 2e10})


def test_no_run_is_no_calibration() -> None:
    with pytest.raises(UserError, match="no measured run"):
        learn([])


# A folder of runs


def write_run(folder: Path, config: TrainConfig, device: str = PROCESSOR, reserved: float | None = None) -> None:
    """What a run of this config leaves behind that takes as long as `COSTS` say."""
    folder.mkdir(parents=True)
    dataset = load_data(config, print)
    parts, shares = step_costs(config, dataset.samples, ON_CPU)
    each = torch.tensor([time_of(resources(CPU, part), COSTS) for part in parts], dtype=torch.float64)
    seconds = (shares @ each).tolist()
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines_of(seconds)))
    tokens = sum(map(len, dataset.samples)) * config.training.epochs
    known = {"status": "ok", "device": device, "runtime_s": sum(seconds), "tokens": tokens, "samples": len(seconds)}
    write_result(folder, new_result(config, "train") | known | {"peak_memory_reserved_mib": reserved})


@pytest.fixture
def folder_config(small_config: TrainConfig) -> TrainConfig:
    small_config.training.max_samples, small_config.training.micro_batch_size = 40, 1
    return replace(small_config, gpu=CPU)


@pytest.fixture(scope="module")
def written() -> dict[str, Path]:
    """Folders of runs that have been written, by the combination."""
    return {}


@pytest.fixture
def sweep(
    folder_config: TrainConfig,
    tmp_path: Path,
    written: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder of two runs of this test's own."""
    monkeypatch.setattr("llama_ft.planning.predict.MAX_PROCESSES", 1)  # to start others takes longer than this
    for toggles in ((False, False, False, False), (False, True, True, False)):
        config = with_optim(folder_config, toggles)
        name = config.optim.combination
        if name not in written:
            written[name] = tmp_path_factory.mktemp("runs") / name
            write_run(written[name], config)
        shutil.copytree(written[name], tmp_path / "sweep" / name)
    return tmp_path / "sweep"


def test_a_plan_with_runs_has_their_times(sweep: Path, folder_config: TrainConfig) -> None:
    samples = load_data(folder_config, print).samples
    optims = combinations(with_gc=False)[1::6]
    rows = predict(folder_config, optims, [CPU], [(len(sample), sample.n_prompt) for sample in samples])
    time = calibrate(rows, learn_from(sweep, [CPU]))
    for row, optim in zip(rows, optims, strict=True):
        (costs,) = run_costs([replace(folder_config, optim=optim)], samples, ON_CPU)
        assert row["runtime_s"] == pytest.approx(time_of(resources(CPU, costs.operators), COSTS), rel=0.01)
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["runtime_s"])
        assert row["bound_runtime_s"] is None  # no rates of this processor are known
    assert time["kind"] == "calibrated"
    assert f"on {PROCESSOR}" in time["about"]
    assert "baseline (tiny" in time["about"]
    assert "float32 at 100 GFLOP/s" in time["about"]


def test_rows_that_the_runs_do_not_tell_of_have_no_time(sweep: Path, folder_config: TrainConfig) -> None:
    rows = predict(folder_config, combinations(with_gc=False)[1:3], [CPU], [(40, 5), (21, 3)])
    time = calibrate(rows, learn_from(sweep / "baseline", [CPU]))
    timed = {row["combination"] for row in rows if row["runtime_s"] is not None}
    assert "mp" not in timed
    assert "no time for mp: none of the runs used matrix products in bfloat16" in time["about"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "baseline/result.json").write_text("{"), "baseline/result.json cannot be read"),
        (lambda d: (d / "baseline/config.yaml").unlink(), "baseline/config.yaml cannot be read"),
        (lambda d: (d / "baseline/config.yaml").write_text("a: ["), "baseline/config.yaml cannot be read"),
        (lambda d: (d / "baseline/metrics.jsonl").write_text("x\n"), "baseline/metrics.jsonl, line 1"),
        (
            lambda d: (d / "baseline/metrics.jsonl").write_text('{"step": 1, "time_s": -1}\n'),
            "baseline/metrics.jsonl is damaged",
        ),
        (lambda d: edit(d, "config.yaml", "path: null", "path: gone.json"), "baseline: the run's data.*gone.json"),
        (lambda d: edit(d, "config.yaml", "max_samples: 40", "max_samples: 39"), "baseline: its data has"),
        (lambda d: edit(d, "result.json", PROCESSOR, "Another"), "several devices, A processor, 2 threads and Another"),
        (lambda d: [edit(d, "result.json", '"ok"', '"oom"', each) for each in ("baseline", "mp_lora")], "no run in it"),
    ],
)
def test_a_folder_that_cannot_be_used_is_said_so(sweep: Path, spoil: Any, message: str) -> None:
    spoil(sweep)
    with pytest.raises(UserError, match=message) as caught:
        learn_from(sweep, [CPU])
    assert len(str(caught.value).splitlines()) <= 2


def edit(folder: Path, file: str, old: str, new: str, run: str = "baseline") -> None:
    text = (folder / run / file).read_text()
    assert old in text
    (folder / run / file).write_text(text.replace(old, new))


def test_runs_of_other_devices(tmp_path: Path, small_config: TrainConfig) -> None:
    known = {"status": "ok", "runtime_s": 1.0, "tokens": 1, "samples": 1}
    for name, device, reserved in (("a", "NVIDIA H200", 1.0), ("b", PROCESSOR, None)):
        (tmp_path / name).mkdir()
        result = new_result(small_config, "train") | known | {"device": device, "peak_memory_reserved_mib": reserved}
        write_result(tmp_path / name, result)
    runs, left_out = runs_of(tmp_path, CPU)
    assert [run.folder.name for run in runs] == ["b"]
    assert left_out == "; 1 run of another device left out"
    with pytest.raises(UserError, match=r"its runs are of A processor, 2 threads, NVIDIA H200.*gpu=a100_40gb"):
        runs_of(tmp_path, replace(CARD, name="a100_40gb"))
    with pytest.raises(UserError, match="no such folder"):
        runs_of(tmp_path / "c", CPU)
    with pytest.raises(UserError, match="one device: name its profile"):
        learn_from(tmp_path, [CPU, CARD])


@pytest.mark.parametrize(
    ("profile", "device", "same"),
    [
        ("a100_40gb", "NVIDIA A100-SXM4-40GB", True),
        ("rtx4090_24gb", "NVIDIA GeForce RTX 4090", True),
        ("NVIDIA H200", "NVIDIA H200", True),  # of gpu=auto
        ("a100_40gb", "NVIDIA H200", False),  # a run capped at the profile's memory, at another card's speed
    ],
)
def test_a_profile_is_of_the_card_of_its_name(profile: str, device: str, same: bool) -> None:
    result = {"peak_memory_reserved_mib": 1.0, "device": device}
    assert is_of(result, replace(CARD, name=profile)) is same
    assert not is_of(result, CPU)


# Real runs


RUNS = [CHECKOUT / "benchmarks" / "plan-time-cpu" / name for name in ("tiny", "llama2_7b_1layer")]


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_two_measured_runs_predict_the_others_within_a_quarter(folder: Path) -> None:
    rows, _ = compare(folder)
    assert len(rows) == 8
    for name, seconds, predicted in rows:
        assert predicted == pytest.approx(seconds, rel=0.25), name
