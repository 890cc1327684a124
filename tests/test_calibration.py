"""Calibration: an efficiency from measured runs, its error, the rows that it gives times, folders that it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.planning import CPU_PROFILE, card

from llama_ft.config import TrainConfig, UserError
from llama_ft.config.groups import MatrixRates
from llama_ft.data.dataset import load_data
from llama_ft.planning.calibration import calibrate, efficiency, errors, measured_runs
from llama_ft.planning.predict import predict
from llama_ft.records.plan import PlanRow
from llama_ft.records.result import CONFIG_FILE, Result, new_result, ran_on, write_result

PROCESSOR = "A processor, 2 threads"
CARD = card("a100_40gb", bandwidth_gb_s=1555.0, tflops=MatrixRates(19.5, 156.0, 312.0, 312.0))


def test_an_efficiency_is_of_all_runs_and_its_error_of_each_by_the_others() -> None:
    runs = [(10.0, 20.0), (30.0, 40.0)]
    assert efficiency(runs) == 40 / 60
    assert errors(runs) == [pytest.approx(10 / (30 / 40) / 20 - 1), pytest.approx(30 / (10 / 20) / 40 - 1)]


def row_of(dtype: str, bound_s: float | None) -> PlanRow:
    row = PlanRow({}, "a", "card", flops={dtype: 6e9}, tokens=100, runtime_s=bound_s, bound_runtime_s=bound_s)
    row.tokens_per_s = None if bound_s is None else 100 / bound_s
    return row


@pytest.mark.parametrize("bound_s", [3.0, None])
def test_rows_take_their_work_over_the_efficiency_of_their_dtype(bound_s: float | None) -> None:
    work = bound_s or 6e9  # a bound on a card, FLOPs where no rates are known
    rows = [row_of("float32", bound_s), row_of("bfloat16", bound_s), PlanRow({}, "b", "card", error="it cannot run")]
    time = calibrate(rows, {"float32": [(work, 12.0), (work, 8.0)], "float16": [(work, 1.0)]}, "a device")
    assert [row.runtime_s for row in rows] == [pytest.approx(10.0), None, None]
    assert [row.tokens_per_s for row in rows] == [pytest.approx(10.0), None, None]
    assert [row.bound_runtime_s for row in rows] == [bound_s, bound_s, None]
    assert time.kind == "calibrated"
    speed = "30% of the bound" if bound_s else "0.6 GFLOP/s"
    error = "each predicted by the others: off by 42% on average and +50% at worst"
    assert time.about.startswith(f"by runs on a device: float32 at {speed} (2 runs, {error}); float16 at ")
    assert "(from one run, so its error is not known)" in time.about
    assert time.about.endswith("no time for bfloat16, in which no run computed")


def write_run(folder: Path, config: TrainConfig, seconds: float, **others: Any) -> Result:
    """What a run leaves behind."""
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(config.to_yaml())
    result = new_result(config, "train")
    result.status, result.device, result.compute_dtype, result.runtime_s = "ok", PROCESSOR, "float32", seconds
    result.tokens = sum(map(len, load_data(config).samples)) * config.training.epochs
    write_result(folder, replace(result, **others))
    return result


@pytest.fixture
def config(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr("llama_ft.planning.processes.MAX_PROCESSES", 1)
    tiny_config.training.max_samples, tiny_config.gpu = 3, CPU_PROFILE
    return tiny_config


def test_runs_of_a_folder_are_planned_as_they_were_configured(config: TrainConfig, tmp_path: Path) -> None:
    with_lora = replace(config, optim=replace(config.optim, lora=True))
    results = [write_run(tmp_path / "sweep" / "a", config, 4.0), write_run(tmp_path / "sweep" / "b", with_lora, 3.0)]
    write_run(tmp_path / "sweep" / "c", config, 1.0, status="oom")
    runs, device = measured_runs(tmp_path, [CPU_PROFILE])
    lengths = [(len(sample), sample.n_prompt) for sample in load_data(config).samples]
    rows = predict([config, with_lora], [CPU_PROFILE], lengths)
    flops = [row.flops["float32"] for row in rows if row.flops]
    expected = [(pytest.approx(n), result.runtime_s) for n, result in zip(flops, results, strict=True)]
    assert (runs, device) == ({"float32": expected}, PROCESSOR)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("training", "max_samples", 2, "a: its data has .* tokens now, but had"),
        ("data", "path", "gone.json", "a cannot be planned without its data: .*gone.json"),
    ],
)
def test_a_run_that_is_no_longer_what_was_measured_is_said_so(
    config: TrainConfig, tmp_path: Path, section: str, key: str, value: object, message: str
) -> None:
    write_run(tmp_path / "a", config, 1.0)
    setattr(getattr(config, section), key, value)
    (tmp_path / "a" / CONFIG_FILE).write_text(config.to_yaml())
    with pytest.raises(UserError, match=message):
        measured_runs(tmp_path, [CPU_PROFILE])


def test_a_folder_has_runs_of_one_device_that_ended_well(config: TrainConfig, tmp_path: Path) -> None:
    write_run(tmp_path / "a", config, 1.0, status="oom")
    with pytest.raises(UserError, match="no run in it has completed"):
        measured_runs(tmp_path, [CPU_PROFILE])
    write_run(tmp_path / "b", config, 1.0)
    write_run(tmp_path / "c", config, 1.0, device="Another")
    with pytest.raises(UserError, match=r"of A proc.* and Another: name"):
        measured_runs(tmp_path, [CPU_PROFILE])
    (tmp_path / "b" / CONFIG_FILE).write_text("a: [")
    with pytest.raises(UserError, match=r"b/config\.yaml cannot be read"):
        measured_runs(tmp_path / "b", [CPU_PROFILE])


def test_runs_of_another_device_calibrate_nothing(config: TrainConfig, tmp_path: Path) -> None:
    write_run(tmp_path / "a", config, 1.0)
    write_run(tmp_path / "b", config, 1.0, device="NVIDIA H200", peak_memory_reserved_mib=1.0)
    assert measured_runs(tmp_path, [CPU_PROFILE])[1] == PROCESSOR
    with pytest.raises(UserError, match=r"its runs are of A processor, 2 threads, NVIDIA H200.*gpu=a100_40gb"):
        measured_runs(tmp_path, [CARD])
    with pytest.raises(UserError, match="no such folder"):
        measured_runs(tmp_path / "c", [CPU_PROFILE])
    with pytest.raises(UserError, match="one device: name its profile"):
        measured_runs(tmp_path, [CPU_PROFILE, CARD])


@pytest.mark.parametrize(
    ("profile", "device", "same"),
    [
        ("a100_40gb", "NVIDIA A100-SXM4-40GB", True),
        ("rtx4090_24gb", "NVIDIA GeForce RTX 4090", True),
        ("NVIDIA H200", "NVIDIA H200", True),  # of gpu=auto
        ("a100_40gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", False),
        ("NVIDIA RTX A6000", "NVIDIA RTX A6000", True),
        ("rtx_a6000_48gb", "NVIDIA RTX A6000", True),
        ("l4_24gb", "NVIDIA L4", True),
        ("l4_24gb", "NVIDIA L40S", False),
        ("rtx3060_12gb", "NVIDIA GeForce RTX 3060 Ti", False),
        ("a100_40gb", "NVIDIA H200", False),  # a run capped at the profile's memory, at another card's speed
    ],
)
def test_a_profile_is_of_the_card_of_its_name(tiny_config: TrainConfig, profile: str, device: str, same: bool) -> None:
    result = replace(new_result(tiny_config, ""), device=device, peak_memory_reserved_mib=1.0)
    assert ran_on(result, profile, on_cuda=True) is same
    assert not ran_on(result, profile, on_cuda=False)
