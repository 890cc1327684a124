"""What `train` asks before a run: whether it fits, at the very limit, what it says, and that CPU runs are not asked."""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from test_advice import LENGTHS, MODEL, card, config_for, one_by_one

import llama_ft.train as train_module
from llama_ft import cli
from llama_ft.config import DataConfig, DeviceChoice, GpuConfig, MeasureConfig, OptimConfig, TrainConfig
from llama_ft.launch import process, system
from llama_ft.planning import check, predict
from llama_ft.planning.check import Capacity, alternatives, capacity_of, objection, would_not_fit
from llama_ft.planning.gpu_traits import traits_of, workspace_bytes
from llama_ft.planning.search import try_run
from llama_ft.records.result import CONFIG_FILE

CARD = card("a", 1000)
TRAITS, WORKSPACE = traits_of(CARD), workspace_bytes(CARD)


def need(optim: OptimConfig) -> float:
    return try_run(config_for(optim=optim), LENGTHS, TRAITS, WORKSPACE).reserved_mib


def asked(optim: OptimConfig, mib: float, context_mib: float = 0) -> str | None:
    capacity = Capacity(mib, context_mib, f"a has {mib:,.0f}")
    return objection(config_for(optim=optim), LENGTHS, capacity, TRAITS, WORKSPACE)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes: they would begin with importing torch."""
    monkeypatch.setattr(predict, "processes", lambda n: nullcontext(one_by_one))


@pytest.mark.parametrize("context_mib", [0, 300])
def test_what_is_needed_is_enough_and_one_less_is_not(context_mib):
    optim = OptimConfig()
    enough = need(optim) + context_mib
    assert asked(optim, enough, context_mib) is None
    text = asked(optim, enough - 1, context_mib)
    assert text is not None
    assert text.startswith(f"baseline on small needs {enough:,.0f} MiB at its peak, and a has {enough - 1:,.0f}: ")
    assert text.endswith("; plan.enforce=false goes on")


def test_what_would_fit_is_named_with_its_need():
    least = OptimConfig(mp=True, lora=True)
    text = asked(OptimConfig(), need(least))
    assert text is not None
    assert f": optim=mp_lora would need {need(least):,.0f};" in text
    accumulating = asked(OptimConfig(ga=True), need(replace(least, ga=True)))
    assert accumulating is not None
    assert "optim=ga_mp_lora would need" in accumulating


def test_where_nothing_would_fit_a_card_is_to_be_found():
    text = asked(OptimConfig(), 30)
    assert text is not None
    assert "even optim=mp_lora optim.gc=true would need" in text
    assert "python -m llama_ft.plan model=small goal=cheapest_gpu" in text
    text = asked(OptimConfig(mp=True, lora=True, gc=True), 30)
    assert text is not None
    assert "even" not in text
    assert "goal=cheapest_gpu" in text


@pytest.mark.parametrize(
    ("on", "activations_suffice", "expected"),
    [
        ("", True, ["gc", "mp_lora_gc"]),
        ("", False, ["mp_lora", "mp_lora_gc"]),
        ("ga", False, ["ga_mp_lora", "ga_mp_lora_gc"]),
        ("mp lora", False, ["mp_lora_gc"]),
        ("mp lora", True, ["mp_lora_gc"]),
        ("lora gc", True, ["mp_lora_gc"]),
        ("gc", False, ["mp_lora_gc"]),
        ("mp lora gc", False, []),
    ],
)
def test_alternatives_are_two_at_most_smallest_change_first(on, activations_suffice, expected):
    optim = OptimConfig(**dict.fromkeys(on.split(), True))
    assert [other.combination for other in alternatives(optim, activations_suffice)] == expected


def test_capacity_is_the_cards_or_what_is_free_or_the_limit():
    def found(gpu: GpuConfig, free_mib: float, limit_mib: int | None = None) -> Capacity:
        config = TrainConfig(MODEL, "random", "t.model", data=DataConfig("sample"), gpu=gpu)
        return capacity_of(replace(config, measure=MeasureConfig(memory_limit_mib=limit_mib)), free_mib, "H200")

    real = replace(CARD, memory_mib=None, context_mib=0)
    assert found(CARD, 5000) == Capacity(1000, 10, "a has 1,000")
    assert found(real, 1234.5) == Capacity(1234.5, 0, "this H200 has 1,234 free")
    assert found(CARD, 5000, 500) == Capacity(500, 0, "measure.memory_limit_mib allows 500")
    assert found(CARD, 5000, 995).usable_mib == 990  # the context leaves no more
    assert found(CARD, 300) == Capacity(300, 0, "this H200 has 300 free")  # a shared card, smaller than the profile


# The process


def answer(
    monkeypatch: pytest.MonkeyPatch, code: str, config: TrainConfig, run_dir: Path
) -> tuple[str | None, list[str]]:
    """What is made of a process that runs this code, on a machine that may have a GPU."""
    said: list[str] = []
    monkeypatch.setattr(check, "may_have_gpu", lambda: True)
    monkeypatch.setattr(check, "COMMAND", (sys.executable, "-c", code))
    return would_not_fit(config, "optim: {}\n", run_dir, said.append), said


def test_the_answer_is_passed_on(tiny_config, monkeypatch, tmp_path):
    reads = f"import sys, json; assert open(sys.argv[1] + '/{CONFIG_FILE}').read()"
    code = f"{reads}; print(json.dumps({{'objection': 'no'}}))"
    assert answer(monkeypatch, code, tiny_config, tmp_path) == ("no", [])
    assert answer(monkeypatch, code.replace("'no'", "None"), tiny_config, tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise SystemExit('driver is odd')", "exit status 1: driver is odd"),
        ("print('what?')", "Expecting value"),
        ("import os; os.abort()", "exit status -6: no message"),
        ("import time; time.sleep(60)", "no answer in 1 s"),
    ],
)
def test_a_check_that_fails_stops_no_run(tiny_config, monkeypatch, tmp_path, code, why):
    monkeypatch.setattr(check, "SECONDS", 1)
    found, said = answer(monkeypatch, code, tiny_config, tmp_path)
    assert found is None
    (line,) = said
    assert why in line
    assert line.endswith("it starts all the same")


def test_nothing_is_asked_where_there_is_no_need(tiny_config, monkeypatch, tmp_path):
    fails = "raise SystemExit('asked')"
    on_cpu = replace(tiny_config, gpu=replace(tiny_config.gpu, device=DeviceChoice.cpu))
    forced = replace(tiny_config, plan=replace(tiny_config.plan, enforce=False))
    for config in (on_cpu, forced):
        assert answer(monkeypatch, fails, config, tmp_path) == (None, [])
    said = answer(monkeypatch, fails, tiny_config, tmp_path)[1]
    assert said
    monkeypatch.setattr(check, "may_have_gpu", lambda: False)
    assert would_not_fit(tiny_config, "", tmp_path, pytest.fail) is None


def test_a_gpu_is_looked_for_among_the_drivers_files(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(system, "GPU_FILES", (str(tmp_path / "absent"), str(tmp_path)))
    assert system.may_have_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not system.may_have_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(system, "GPU_FILES", (str(tmp_path / "absent"),))
    assert not system.may_have_gpu()


def test_the_process_itself_answers(tmp_path, tiny_config):
    """Without a GPU that PyTorch sees there is nothing against a run."""
    from omegaconf import OmegaConf

    config = replace(tiny_config, gpu=GpuConfig("auto"))
    (tmp_path / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(config.to_dict())))
    ended = run("llama_ft.planning.check", str(tmp_path), cwd=tmp_path)
    assert (ended.returncode, json.loads(ended.stdout)) == (0, {"objection": None}), ended.stderr


# The command


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> Any:
    """The command in this process; runs and checks are noted, and each check objects."""
    monkeypatch.chdir(tmp_path)
    done: list[str] = []

    def would_not_fit(*_: Any) -> str:
        done.append("asked")
        return "it needs 2 MiB, and a has 1; plan.enforce=false goes on"

    def started(*_: Any) -> dict[str, Any]:
        done.append("run")
        return {"status": "ok"}

    def command(*arguments: str) -> tuple[int, list[str], str]:
        done.clear()
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(train_module, "would_not_fit", would_not_fit)
        monkeypatch.setattr(train_module, "report_sweep", lambda *_: [])
        monkeypatch.setattr(train_module, "track_sweep", lambda *_: None)
        monkeypatch.setattr(train_module.TrainCommand, "run", started)
        monkeypatch.setattr(sys, "argv", ["llama_ft.train", *arguments, "tracker=disabled"])
        with pytest.raises(SystemExit) as ended:
            cli.run_command(train_module.TrainCommand().main, train_module.USAGE)
        return ended.value.code, list(done), capsys.readouterr().err  # type: ignore[return-value]

    return command


def test_a_run_that_would_not_fit_is_not_started(train, tmp_path):
    status, done, error = train("hydra.run.dir=out")
    assert (status, done) == (2, ["asked"])
    assert error == "error: it needs 2 MiB, and a has 1; plan.enforce=false goes on\n"
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["status"], result["config_hash"]) == ("error", None)  # so that the same command tries again
    assert "2 MiB" in result["error"]


def test_rows_of_a_sweep_are_measured_all_the_same(train):
    assert train("-m", "optim=baseline,lora", "hydra.sweep.dir=sweep")[:2] == (0, ["run", "run"])


def test_hash_knows_nothing_of_enforcing(tiny_config):
    forced = replace(tiny_config, plan=replace(tiny_config.plan, enforce=False))
    assert forced.hash() == tiny_config.hash()
    assert forced.to_dict()["plan"] == {"enforce": False}


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_runs_have_expandable_segments_unless_the_user_says_otherwise(monkeypatch, name):
    for each in process.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(each, raising=False)
    ours = process.child_environment()
    assert ours["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert ours["PATH"] == os.environ["PATH"]
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    theirs = process.child_environment()
    assert {each: theirs[each] for each in process.ALLOCATOR_VARIABLES if each in theirs} == {
        name: "backend:cudaMallocAsync"
    }
