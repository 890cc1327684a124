"""Every way in which a run can end, through the real command."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Sweep, environment, injected, run
from safetensors.numpy import load_file

from llama_ft import device
from llama_ft.config import TrainConfig
from llama_ft.launch import endings
from llama_ft.records.result import new_result, read_result, write_result

CHILD = "llama_ft.launch.child"
SMALL = ("training.micro_batch_size=1", "training.max_samples=8", "tracker=disabled")
TINY_PARAMETERS = 2 * 2048 * 192 + 6 * (4 * 192 * 192 + 3 * 192 * 512 + 2 * 192) + 192
LORA_PARAMETERS = 6 * 2 * (16 * 192 + 192 * 16)  # A and B of rank 16 on wq and wv in six layers

NUMBERS = (int, float)
ABSENT = type(None)
CATEGORIES = {"parameter", "gradient", "optimizer_state", "activation", "gathered", "other"}
CONTRACT: dict[str, Any] = {
    **dict.fromkeys(("status", "config_hash", "combination", "model", "data", "gpu", "device", "command"), str),
    **dict.fromkeys(("schema_version", "samples", "tokens", "trainable_params", "total_params"), int),
    **dict.fromkeys(("runtime_s", "tokens_per_s", "peak_memory_mib", "peak_rss_mib"), NUMBERS),
    **dict.fromkeys(("trainable_percent", "loss_first", "loss_last"), NUMBERS),
    **dict.fromkeys(("optim", "memory_mib", "memory_max_mib", "versions"), dict),
    "breakdown": list,
    "error": (str, ABSENT),
    "peak_memory_reserved_mib": (*NUMBERS, ABSENT),  # none on the CPU
}


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train(run_dir: Path, *overrides: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return run("llama_ft.train", *SMALL, *overrides, f"hydra.run.dir={run_dir}", cwd=run_dir.parent, env=env)


# ---------------------------------------------------------------------------------------------------------------- ok


@pytest.fixture(scope="module")
def ok_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """8 samples twice, three at a time: 2 * ceil(8 / 3) = 6 optimizer steps."""
    cwd = tmp_path_factory.mktemp("ok")
    overrides = ("optim=ga_lora", "ga.steps=3", "training.epochs=2", "hydra.run.dir=place/of my own")
    return run("llama_ft.train", *SMALL, *overrides, cwd=cwd), cwd / "place" / "of my own"


@pytest.mark.process
def test_ok_exits_with_0_and_says_what_it_trains(ok_run: Any) -> None:
    done, _ = ok_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{LORA_PARAMETERS:,} of {TINY_PARAMETERS + LORA_PARAMETERS:,}" in done.stdout
    assert "2.096 %" in done.stdout
    assert done.stderr == ""


@pytest.mark.process
def test_ok_leaves_these_files_and_no_others(ok_run: Any) -> None:
    _, run_dir = ok_run
    expected = {"config.yaml", "metrics.jsonl", "result.json", "train.log"}
    expected |= {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in run_dir.iterdir()} == expected
    assert {path.name for path in run_dir.parent.parent.iterdir()} == {"place"}


@pytest.mark.process
def test_result_has_every_key_of_the_contract_in_its_type(ok_run: Any) -> None:
    result = read_json(ok_run[1] / "result.json")
    assert not CONTRACT.keys() - result.keys()
    wrong = {key: result[key] for key, kind in CONTRACT.items() if not isinstance(result[key], kind)}
    assert not wrong
    assert result["status"] == "ok"
    assert result["error"] is None
    assert result["combination"] == "ga_lora"
    assert result["optim"] == {"ga": True, "mp": False, "lora": True, "gc": False, "neft": False}
    assert result["command"].startswith("python -m llama_ft.train training.micro_batch_size=1 training.max_samples=8 ")


@pytest.mark.process
def test_result_counts_what_was_trained(ok_run: Any) -> None:
    result = read_json(ok_run[1] / "result.json")
    assert result["trainable_params"] == LORA_PARAMETERS
    assert result["total_params"] == TINY_PARAMETERS + LORA_PARAMETERS
    assert result["trainable_percent"] == pytest.approx(100 * LORA_PARAMETERS / (TINY_PARAMETERS + LORA_PARAMETERS))
    assert result["samples"] == 8 * 2
    assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["runtime_s"])


@pytest.mark.process
def test_memory_by_category_sums_to_the_peak(ok_run: Any) -> None:
    result = read_json(ok_run[1] / "result.json")
    at_peak, peak = result["memory_mib"], result["peak_memory_mib"]
    assert at_peak.keys() == result["memory_max_mib"].keys() == CATEGORIES
    assert sum(at_peak.values()) == pytest.approx(peak, rel=1e-9)
    assert at_peak["other"] <= 0.05 * peak
    assert all(at_peak[category] <= result["memory_max_mib"][category] + 1e-9 for category in CATEGORIES)


@pytest.mark.process
def test_the_breakdown_itemises_the_peak(ok_run: Any) -> None:
    result = read_json(ok_run[1] / "result.json")
    assert all(line.keys() >= {"category", "dtype", "mib"} for line in result["breakdown"])
    for category in CATEGORIES:
        lines = [line["mib"] for line in result["breakdown"] if line["category"] == category]
        assert sum(lines) == pytest.approx(result["memory_mib"][category], rel=1e-9), category
    assert all(line.get("item") for line in result["breakdown"] if line["category"] == "other")


@pytest.mark.process
def test_metrics_have_a_line_for_each_optimizer_step(ok_run: Any) -> None:
    metrics, result = read_metrics(ok_run[1]), read_json(ok_run[1] / "result.json")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert {line["total_steps"] for line in metrics} == {6}
    assert metrics[-1]["tokens"] == result["tokens"]
    assert (metrics[0]["loss"], metrics[-1]["loss"]) == (result["loss_first"], result["loss_last"])
    assert metrics[-1]["time_s"] <= result["runtime_s"] + 1.0


@pytest.mark.process
def test_config_file_is_the_resolved_config(ok_run: Any) -> None:
    config = yaml.safe_load((ok_run[1] / "config.yaml").read_text())
    assert config["optim"] == {"ga": True, "mp": False, "lora": True, "gc": False, "neft": False}
    assert config["ga"]["steps"] == 3
    told = {"lr": 2.5e-4, "epochs": 2, "max_samples": 8, "micro_batch_size": 1}
    assert told.items() <= config["training"].items()
    assert config["model"]["name"] == "tiny"


@pytest.mark.process
def test_adapter_loads_and_has_learned(ok_run: Any) -> None:
    adapter = load_file(ok_run[1] / "adapter_model.safetensors")
    layers = [f"base_model.model.model.layers.{n}.self_attn.{w}_proj" for n in range(6) for w in "qv"]
    names = {f"{layer}.lora_{m}.weight" for layer in layers for m in "AB"}
    assert adapter.keys() == names
    for name, tensor in adapter.items():
        assert tensor.shape == ((16, 192) if "lora_A" in name else (192, 16))
        assert (tensor != 0).any(), name


# --------------------------------------------------------------------------------------------------------------- oom


@pytest.mark.process
def test_a_run_beyond_its_memory_limit_is_out_of_memory(limited_sweep: Sweep) -> None:
    result = limited_sweep.results()["baseline"]
    assert result["status"] == "oom", limited_sweep.process.stdout
    assert "out of memory" in result["error"]
    assert result["memory_limit_mib"] == 650
    assert result["runtime_s"] is None
    assert CONTRACT.keys() <= result.keys()
    assert result["total_params"] > TINY_PARAMETERS  # what was known by then is kept
    assert "oom: out of memory" in limited_sweep.process.stdout


@pytest.mark.process
def test_pythons_own_memory_error_is_out_of_memory_and_no_failure(tmp_path: Path) -> None:
    code = "import torch\ndef fail(*_, **__): raise MemoryError()\ntorch.optim.AdamW.step = fail"
    env = injected(tmp_path / "inject", into=CHILD, code=code)
    done = train(tmp_path / "run", env=env)
    assert read_json(tmp_path / "run" / "result.json")["status"] == "oom", done.stdout
    assert done.returncode == 0


# ------------------------------------------------------------------------------------------------------ error, input


@pytest.mark.process
def test_an_unexpected_exception_is_an_error_with_its_traceback_in_the_log(tmp_path: Path) -> None:
    code = "import torch\ndef fail(*_, **__): raise ValueError('a fault of ours')\ntorch.optim.AdamW.step = fail"
    env = injected(tmp_path / "inject", into=CHILD, code=code)
    done = train(tmp_path / "run", env=env)
    result, log = read_json(tmp_path / "run" / "result.json"), (tmp_path / "run" / "train.log").read_text()
    assert done.returncode == 1
    assert result["status"] == "error"
    assert "ValueError" in result["error"]
    assert "a fault of ours" in result["error"]
    assert "Traceback" in log
    assert "sitecustomize.py" in log
    assert "a fault of ours" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


WRONG = {
    "a choice that does not exist": (["optim=everything"], ["optim", "everything", "ga_mp_lora"]),
    "a value out of range": (["lora.rank=0"], ["lora.rank=0", "at least 1"]),
    "an enum": (["mp.dtype=int8"], ["int8", "bf16", "fp16"]),
    "a number that is none": (["training.lr=fast"], ["training.lr", "fast"]),
    "weights that are needed": (["model=llama2_7b"], ["llama2_7b", "checkpoint=DIR", "checkpoint=random"]),
    "a data file that is not there": (["data.path=nowhere.json"], ["nowhere.json", "No such file"]),
}


@pytest.mark.process
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_explained_in_a_few_lines(tmp_path: Path, case: str) -> None:
    overrides, explained = WRONG[case]
    done = train(tmp_path / "run", *overrides)
    text = done.stdout + done.stderr
    lines = [line for line in text.splitlines() if line.strip()]
    assert done.returncode not in (0, 130)
    assert "Traceback" not in text
    assert len(lines) <= 15
    missing = [word for word in explained if word not in lines[-1]]
    assert not missing, f"the last line does not say {missing}:\n{text}"


# ------------------------------------------------------------------------------------- killed, interrupted, orphaned


class Running:
    """A command that trains until something stops it."""

    def __init__(self, run_dir: Path) -> None:
        overrides = (
            "training.micro_batch_size=1",
            "training.max_samples=2",
            "training.epochs=100000",
            "tracker=disabled",
            f"hydra.run.dir={run_dir}",
        )
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llama_ft.train", *overrides],
            cwd=run_dir.parent,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # As from a terminal, also where these tests run in the background of a script, which ignores Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.output = ""

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.05)

    def wait_until(self, moment: str) -> None:
        if moment == "training":
            metrics = self.run_dir / "metrics.jsonl"
            self.wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        else:  # importing torch, which takes a second
            self.wait_for((self.run_dir / "train.log").exists)
            maps = Path(f"/proc/{self.child()}/maps")
            self.wait_for(lambda: "libtorch" in maps.read_text())

    def child(self) -> int:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])

    def finish(self) -> int:
        self.output, _ = self.process.communicate(timeout=30)
        return self.process.returncode

    def result(self) -> dict[str, Any]:
        return read_json(self.run_dir / "result.json")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # what is dead may wait for init to collect it


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("finds the run's process through Linux's /proc")
    command = Running(tmp_path / "run")
    yield command
    command.process.kill()
    command.process.wait()


@pytest.mark.process
def test_a_killed_run_is_killed_not_out_of_memory(running: Running) -> None:
    running.wait_until("training")
    os.kill(running.child(), signal.SIGKILL)
    assert running.finish() == 1
    assert running.result()["status"] == "killed"
    assert "signal 9" in running.result()["error"]
    assert CONTRACT.keys() <= running.result().keys()
    assert "Traceback" not in running.output
    assert all(line["loss"] > 0 for line in read_metrics(running.run_dir)[:-1])


STAGES = {"start": ("start-up", "reading the data"), "training": ("training",)}


@pytest.mark.process
@pytest.mark.parametrize(("sent", "moment"), [(signal.SIGINT, "training"), (signal.SIGTERM, "start")])
def test_an_interrupted_run_stops_its_process_and_says_so(running: Running, sent: signal.Signals, moment: str) -> None:
    running.wait_until(moment)
    child = running.child()
    running.process.send_signal(sent)
    assert running.finish() == 130
    assert not is_alive(child)
    assert running.result()["status"] == "interrupted"
    assert any(stage in running.result()["error"] for stage in STAGES[moment])
    assert "interrupted" in running.output
    assert "Traceback" not in running.output
    if moment == "training":
        assert [line["step"] for line in read_metrics(running.run_dir)][:2] == [1, 2]


@pytest.mark.process
@pytest.mark.parametrize("moment", ["start", "training"])
def test_a_run_ends_with_its_command_however_that_dies(running: Running, moment: str) -> None:
    running.wait_until(moment)
    child = running.child()
    running.process.kill()
    running.process.wait()
    running.wait_for(lambda: not is_alive(child), seconds=15)
    assert running.result()["status"] == "interrupted"
    assert any(stage in running.result()["error"] for stage in STAGES[moment])


@pytest.mark.parametrize("near", [False, True])
def test_an_unclear_error_is_out_of_memory_only_near_the_limit(monkeypatch: pytest.MonkeyPatch, near: bool) -> None:
    assert not device.is_near_data_limit()  # there is no limit here
    monkeypatch.setattr(device, "is_near_data_limit", lambda: near)
    for word in ("create", "execute"):
        assert device.is_out_of_memory(RuntimeError(f"could not {word} a primitive")) == near
    assert device.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert device.is_out_of_memory(MemoryError())
    assert not device.is_out_of_memory(RuntimeError("shapes do not match"))


# ------------------------------------------------------------------------- the parent's judgement on a child that died


@pytest.mark.parametrize(
    ("code", "log", "resident", "was_oom_kill", "status"),
    [
        (-signal.SIGKILL, "", 10, False, "killed"),
        (-signal.SIGKILL, "", 95, False, "oom"),  # nearly all the memory there is
        (-signal.SIGKILL, "", 10, True, "oom"),  # the control group counted a kill
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'", 10, False, "oom"),
        (-signal.SIGSEGV, "", 10, False, "error"),
        (7, "", 10, False, "error"),
    ],
)
def test_a_signal_9_needs_evidence_to_be_out_of_memory(
    code: int, log: str, resident: int, was_oom_kill: bool, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "total_memory_bytes", lambda: 100.0)
    (tmp_path / "train.log").write_text(log)
    seen = endings.Seen(resident, was_oom_kill=was_oom_kill)
    found, error = endings.ending_of_killed(code, seen, None, tmp_path / "train.log")
    assert found == status
    assert error


@pytest.mark.parametrize(("share", "status"), [(0.95, "oom"), (0.5, "error")])
def test_a_crash_is_out_of_memory_only_near_the_limit(tmp_path: Path, share: float, status: str) -> None:
    seen = endings.Seen(data_bytes=int(share * 400 * 2**20))
    assert endings.ending_of_killed(-signal.SIGSEGV, seen, 400, tmp_path / "train.log")[0] == status


# -------------------------------------------------------------------------------------------------- whole or not at all


def test_a_result_is_replaced_whole_or_not_at_all(tmp_path: Path, tiny_config: TrainConfig) -> None:
    result = new_result(tiny_config, "command")
    write_result(tmp_path, result)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk: writing stops half-way
    try:
        with pytest.raises(OSError, match="File too large"):
            write_result(tmp_path, replace(result, error="x" * 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_result(tmp_path) == result
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
