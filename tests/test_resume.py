"""Runs and sweeps that are stopped at any moment and go on: equal to the bit to those that nothing disturbed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, injected, run
from safetensors.numpy import load_file
from test_process import CHILD, is_alive, read_json, read_metrics

pytestmark = pytest.mark.process  # real commands

# Each test is given this many random moments; more of them make a longer, more thorough test.
N_KILLS = int(os.environ.get("LLAMA_FT_KILLS", "2"))
SIZES = (
    "checkpoint=random",
    *(f"model.{size}" for size in ("dim=64", "ffn_dim=96", "n_layers=2", "n_heads=4", "n_kv_heads=4")),
)
# Windows of 4 and, last, 2.
STEPS = (
    "training.micro_batch_size=1",
    "training.max_samples=26",
    "training.epochs=2",
    "ga.steps=4",
    "tracker=disabled",
    *SIZES,
)
N_STEPS = 2 * 7
THREE = ("training.micro_batch_size=1", "training.max_samples=3", "tracker=disabled")
# So that the run is still on its way when the first line of its metrics is seen.
SLOW_STEPS = """
import time
from llama_ft.training.step import TrainStep
step = TrainStep.__call__
def slow_step(self, window):
    time.sleep(0.3)
    return step(self, window)
TrainStep.__call__ = slow_step
"""


def command(run_dir: Path, *overrides: str) -> list[str]:
    return ["llama_ft.train", *STEPS, *overrides, f"hydra.run.dir={run_dir}"]


def start(cwd: Path, arguments: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []


def trained(run_dir: Path) -> dict[str, bytes]:
    (file,) = run_dir.glob("*model.safetensors")
    return {name: tensor.tobytes() for name, tensor in load_file(file).items()}


def losses(run_dir: Path) -> list[tuple[int, float, float | None, float, int]]:
    keys = ("step", "loss", "grad_norm", "lr", "tokens")
    return [tuple(line[key] for key in keys) for line in read_metrics(run_dir)]


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step_")) for folder in (run_dir / "checkpoints").iterdir())


def assert_same_end(run_dir: Path, undisturbed: Path) -> None:
    assert losses(run_dir) == losses(undisturbed)
    assert trained(run_dir) == trained(undisturbed)
    ends = [read_json(folder / "result.json") for folder in (run_dir, undisturbed)]
    for key in ("status", "loss_first", "loss_last", "train_loss_before", "train_loss_after", "samples", "tokens"):
        assert ends[0][key] == ends[1][key], key


WITH_NOISE = "ga_lora optim.neft=true training.optimizer=sgd training.momentum=0 training.lr=0.1"


IN_BACKWARD = (
    "baseline training.micro_batch_size=4 training.optimizer=adamw_8bit training.optimizer_in_backward=true"
    " training.max_grad_norm=inf"
)

IN_4_BITS = "ga_mp_lora optim.gc=true gc.policy=selective mp.frozen_weights=nf4 training.optimizer=adamw_8bit"


@pytest.fixture(scope="module", params=["ga_lora", "ga_mp mp.dtype=fp16", WITH_NOISE, IN_BACKWARD, IN_4_BITS])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], float]:
    """A run that saves nothing on its way, its overrides, and the seconds that it took."""
    overrides = f"optim={request.param}".split()
    cwd = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    done = run(*command(cwd / "run", *overrides), cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "run", overrides, time.monotonic() - began


def test_saving_changes_nothing_and_keeps_the_newest_two(undisturbed: Any, tmp_path: Path) -> None:
    reference, overrides, _ = undisturbed
    done = run(*command(tmp_path / "run", *overrides, "training.save_every=4"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(tmp_path / "run", reference)
    assert saved_steps(tmp_path / "run") == [12, 14]  # the end too
    files = {file.suffix for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file()}
    assert files == {".safetensors", ".json"}  # nothing that could run code


def kill_at_random_moments(
    cwd: Path, arguments: list[str], seconds: float, moments: random.Random, env: dict[str, str] | None = None
) -> None:
    """Start a command again and again, and kill it or its run at moments in so many seconds; then let it end."""
    for kill in range(N_KILLS):
        process = start(cwd, arguments, env)
        end = time.monotonic() + moments.uniform(0.2, 1.0) * seconds
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
        orphans = children(process.pid)
        victims = orphans if kill % 2 else [process.pid]  # the run itself, or its command
        for victim in victims:
            with suppress(ProcessLookupError):  # it was at its end
                os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output, output
        wait_until(lambda orphans=orphans: not any(map(is_alive, orphans)), 30)
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def test_killed_at_random_moments_and_resumed(undisturbed: Any, tmp_path: Path) -> None:
    reference, overrides, seconds = undisturbed
    arguments = command(tmp_path / "run", *overrides, "training.save_every=1", "training.resume=true")
    kill_at_random_moments(tmp_path, arguments, seconds, random.Random(len(overrides)))
    assert_same_end(tmp_path / "run", reference)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert len(saved_steps(tmp_path / "run")) <= 2


# Moments within the training, within held-out losses and while the best weights are written are likely then.
SLOW_PARTS = """
import time, llama_ft.training.held_out as held_out, llama_ft.training.saver as saver
def slow(function, seconds):
    def slower(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)
    return slower
held_out.evaluate = slow(held_out.evaluate, 0.2)
saver.to_disk = slow(saver.to_disk, 0.05)
saver.remove_older = slow(saver.remove_older, 0.05)
"""


def test_killed_with_held_out_losses_best_weights_and_patience(tmp_path: Path) -> None:
    overrides = "optim=lora data.validation=8 training.eval_every=4 training.keep_best=true training.patience=3".split()
    arguments = [*overrides, "training.epochs=8", "training.lr=0.03", "training.micro_batch_size=3"]
    done = run(*command(tmp_path / "whole", *arguments), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(tmp_path / "whole" / "result.json")
    assert 0 < result["best_eval_step"] < result["stopped_early_at_step"] == result["last_eval_step"] < 48
    run_dir, slow = tmp_path / "run", injected(tmp_path / "inject", into=CHILD, code=SLOW_PARTS)
    saving = command(run_dir, *arguments, "training.save_every=3", "training.resume=true")
    kill_at_random_moments(tmp_path, saving, 9, random.Random(19), slow)

    def lines(folder: Path) -> list[dict[str, Any]]:
        clocks = ("time_s", "tokens_per_s", "eval_time_s", "memory_mib")
        return [{key: line[key] for key in line if key not in clocks} for line in read_metrics(folder)]

    assert lines(run_dir) == lines(tmp_path / "whole")
    assert trained(run_dir) == trained(tmp_path / "whole")
    again = read_json(run_dir / "result.json")
    for key in result:
        if "eval" in key or "loss" in key or key in ("status", "samples", "tokens", "stopped_early_at_step"):
            assert again[key] == result[key] or key == "eval_runtime_s", key
    best, last = result["best_eval_step"], result["last_eval_step"]
    folders = [sorted(path.name for path in (each / "checkpoints").iterdir()) for each in (run_dir, tmp_path / "whole")]
    assert folders[1] == [f"best_{best:08}", f"step_{last:08}"]
    assert folders[0][0] == folders[1][0]
    assert folders[0][-1] == folders[1][-1]


def test_ctrl_c_saves_the_step_and_resuming_goes_on_from_it(undisturbed: Any, tmp_path: Path) -> None:
    reference, overrides, _ = undisturbed
    run_dir = tmp_path / "run"
    process = start(tmp_path, command(run_dir, *overrides), injected(tmp_path / "inject", into=CHILD, code=SLOW_STEPS))
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    result, (step,) = read_json(run_dir / "result.json"), saved_steps(run_dir)
    assert result["status"] == "interrupted"
    assert f"saved after optimizer step {step}" in result["error"]
    assert len(read_metrics(run_dir)) == step < N_STEPS

    refused = run(*command(run_dir, *overrides), cwd=tmp_path)
    assert refused.returncode == 2
    assert "training.resume=true continues it" in refused.stderr
    assert saved_steps(run_dir) == [step]

    done = run(*command(run_dir, *overrides, "training.resume=true"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after optimizer step {step}" in done.stdout
    assert read_json(run_dir / "result.json")["resumed_at_step"] == step
    assert_same_end(run_dir, reference)


def test_a_sweep_killed_at_random_moments_loses_no_finished_row(tmp_path: Path) -> None:
    folder, moments, finished = tmp_path / "sweep", random.Random(3), {}
    arguments = ["llama_ft.train", "-m", "optim=ga,ga_lora,lora", f"hydra.sweep.dir={folder}", *STEPS]
    for _ in range(N_KILLS):
        process = start(tmp_path, arguments)
        time.sleep(moments.uniform(1, 8))
        for victim in children(process.pid)[: moments.randrange(2)]:  # the command alone, or the run beside it
            os.kill(victim, signal.SIGKILL)
        process.kill()
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output, output
        for file in folder.glob("*/result.json"):
            if read_json(file)["status"] == "ok":
                finished.setdefault(file, file.read_bytes())
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(file.read_bytes() == content for file, content in finished.items())
    results = {file.parent.name: read_json(file) for file in folder.glob("*/result.json")}
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys(
        ("ga", "ga_lora", "lora"), "ok"
    )
    assert len((folder / "table2.csv").read_text().splitlines()) == 4


def test_a_second_sweep_in_the_same_folder_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    arguments = ["llama_ft.train", "-m", "optim=ga,lora", f"hydra.sweep.dir={folder}", *STEPS]
    first = start(tmp_path, arguments)
    wait_until((folder / "ga").exists)
    second = run(*arguments, cwd=tmp_path)
    assert second.returncode == 2
    assert second.stderr == f"error: another run is writing into {folder}: wait for its end, or name another folder\n"
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert (folder / "table2.md").exists()


def test_a_resume_without_a_folder_says_which_key_is_missing(tmp_path: Path) -> None:
    done = run("llama_ft.train", "training.resume=true", *STEPS, cwd=tmp_path)
    assert done.returncode == 2
    assert "add hydra.run.dir=DIR" in done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint after its last step but one."""
    cwd = tmp_path_factory.mktemp("saved")
    done = run("llama_ft.train", *THREE, "training.save_every=2", f"hydra.run.dir={cwd / 'run'}", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "run"


def unfinished(saved: Path, folder: Path) -> Path:
    """A copy of the run, as it was before it ended."""
    shutil.copytree(saved, folder / "run", ignore=shutil.ignore_patterns("step_00000003"))
    (folder / "run" / "result.json").unlink()
    return folder / "run"


BREAK = {
    "state cut": lambda folder: (folder / "state.json").write_text('{"config_hash": "'),
    "state missing": lambda folder: (folder / "state.json").unlink(),
    "optimizer cut": lambda folder: os.truncate(folder / "optimizer.safetensors", 5000),
    "optimizer missing": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "weights cut": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "weights of another model": lambda folder: shutil.copy(
        folder / "optimizer.safetensors", folder / "model.safetensors"
    ),
    "metrics missing": lambda folder: (folder.parent.parent / "metrics.jsonl").unlink(),
    "metrics cut": lambda folder: os.truncate(folder.parent.parent / "metrics.jsonl", 300),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_damaged_checkpoint_is_refused_by_name(saved: Path, tmp_path: Path, how: str) -> None:
    run_dir = unfinished(saved, tmp_path)
    (folder,) = (run_dir / "checkpoints").iterdir()
    BREAK[how](folder)
    done = run("llama_ft.train", *THREE, "training.resume=true", f"hydra.run.dir={run_dir}", cwd=tmp_path)
    assert done.returncode in (1, 2)
    last = done.stderr.strip().splitlines()[-1]
    assert str(run_dir / "metrics.jsonl" if "metrics" in how else folder) in last
    assert "Traceback" not in done.stderr
    assert "looks like a bug" not in done.stderr


def test_a_checkpoint_of_another_configuration_is_refused(saved: Path, tmp_path: Path) -> None:
    run_dir = unfinished(saved, tmp_path)
    before = (run_dir / "metrics.jsonl").read_bytes()
    changed = ("training.lr=0.5", "training.resume=true", f"hydra.run.dir={run_dir}")
    done = run("llama_ft.train", *THREE, *changed, cwd=tmp_path)
    assert done.returncode == 2
    assert "another configuration" in done.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before
