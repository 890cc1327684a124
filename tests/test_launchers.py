"""Sweeps whose runs Hydra's launchers start: joblib's, submitit's on this machine and on a stand-in for a cluster."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import Sweep, environment, injected, run, run_sweep
from omegaconf import OmegaConf
from test_sweep import CHILD, FAST

from llama_ft.cli import hydra_keys
from llama_ft.cli.compose import composed
from llama_ft.config import UserError
from llama_ft.files import try_lock
from llama_ft.launch import cards
from llama_ft.launch.interrupts import StoppedByQueue, queue_signals_raised

ROWS = ("-m", "optim=lora,ga", *FAST, "training.max_samples=9")
LAUNCHERS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("hydra/launcher=submitit_local",),
    "submitit_slurm": ("hydra/launcher=submitit_slurm",),
}
VARY = re.compile("runtime|tokens_per|rss|joules|folder|command")  # columns of a table

# A cluster of one: jobs follow each other, and are started again when they have asked for it.
CLUSTER = {
    "sbatch": """
cp "$1" "$CLUSTER/script"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
export SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_ID=7
(for task in $(seq 0 ${last:-0}); do
  [ -z "$last" ] || export SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$((8 + task))
  while bash "$CLUSTER/script"; [ -e "$CLUSTER/requeue" ]; do mv "$CLUSTER/requeue" "$CLUSTER/requeued"; done
done) </dev/null >/dev/null 2>&1 &
echo Submitted batch job 7
""",
    "srun": """
while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
exec "$@" >>"$CLUSTER/job_$SLURM_JOB_ID" 2>&1
""",
    "scontrol": 'echo "$@" > "$CLUSTER/requeue"',
    "sacct": "echo 'JobID|State|NodeList'; for job in 7 7_0 7_1; do echo \"$job|RUNNING|here\"; done",
}


def cluster(folder: Path) -> dict[str, str]:
    """Environment with SLURM's commands in it."""
    folder.mkdir()
    for name, code in CLUSTER.items():
        (folder / name).write_text(f"#!/bin/bash\n{code.lstrip()}")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "CLUSTER": str(folder)}


def table(sweep: Sweep) -> list[dict[str, str]]:
    """The rows as in the CSV file, without what differs from time to time."""
    rows = csv.DictReader((sweep.folder / "table2.csv").open())
    return [{key: value for key, value in row.items() if not VARY.search(key)} for row in rows]


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The same sweep by Hydra's own launcher."""
    cwd = tmp_path_factory.mktemp("basic")
    return run_sweep(cwd, *ROWS, "hydra.sweep.dir=sweep", folder=cwd / "sweep")


@pytest.mark.process
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_sweep_gives_the_same_table_wherever_its_runs_take_place(basic: Sweep, name: str, tmp_path: Path) -> None:
    env = cluster(tmp_path / "cluster") if name == "submitit_slurm" else {}
    sweep = run_sweep(tmp_path, *ROWS, *LAUNCHERS[name], "hydra.sweep.dir=sweep", folder=tmp_path / "sweep", env=env)
    assert sweep.process.returncode == 0, sweep.process.stdout + sweep.process.stderr
    assert table(sweep) == table(basic)
    assert [row["combination"] for row in table(sweep)] == ["lora", "ga"]
    assert {"peak_memory_mib", "loss_last"} <= table(sweep)[0].keys()
    assert sweep.results()["ga"]["command"].endswith("hydra.sweep.dir=sweep")  # to be typed again
    assert not (sweep.folder / ".ended").exists()


def until(holds: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What holds, once it does."""
    end = time.monotonic() + 90
    while not (found := holds()):
        assert time.monotonic() < end, "it took too long"
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    return found


def start(cwd: Path, *arguments: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llama_ft.train", *ROWS, "hydra.sweep.dir=sweep", *arguments]
    pipe: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment(env), start_new_session=True, **pipe)


SLOW = """
import time
from llama_ft.training.metrics import StepMeter
record = StepMeter.record
def slow_record(*arguments):
    time.sleep(0.5)
    return record(*arguments)
StepMeter.record = slow_record
"""


@pytest.mark.process
@pytest.mark.parametrize("name", ["joblib", "submitit_local"])
def test_a_sweep_that_was_killed_is_reported_on_and_goes_on_with_the_rows_that_are_missing(
    basic: Sweep, name: str, tmp_path: Path
) -> None:
    launcher = (f"hydra/launcher={name}", "hydra.sweeper.max_batch_size=1")
    process = start(tmp_path, *launcher, env=injected(tmp_path / "inject", into="sweep/ga ", code=SLOW))
    folder = tmp_path / "sweep"
    try:
        until(lambda: (folder / "ga" / "metrics.jsonl").exists(), process)
        report = run("llama_ft.report", str(folder), cwd=tmp_path)
        assert report.returncode == 0, report.stderr
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # and all that it has started, but not the run
        process.communicate()
    assert [row["combination"] for row in csv.DictReader((folder / "table2.csv").open())] == ["lora"]
    before = (folder / "lora" / "result.json").read_bytes()
    sweep = run_sweep(tmp_path, *ROWS, *launcher, "hydra.sweep.dir=sweep", folder=folder)
    assert sweep.process.returncode == 0, sweep.process.stdout + sweep.process.stderr
    assert (folder / "lora" / "result.json").read_bytes() == before
    assert table(sweep) == table(basic)


@pytest.mark.process
def test_rows_that_fail_in_jobs_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    code = "import os\nif '/lora,' in ' '.join(sys.orig_argv): os._exit(7)"
    env = injected(tmp_path / "inject", into=CHILD, code=code)
    rows = ("-m", "optim=ga,lora", "training.seed=1,-1", *FAST, *LAUNCHERS["joblib"])
    done = run("llama_ft.train", *rows, "hydra.sweep.dir=sweep", cwd=tmp_path, env=env)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("3 of 4 runs failed: ")
    failed = ["ga,training.seed=-1", "lora,training.seed=-1", "lora,training.seed=1"]
    assert sorted(re.findall(r"(\S+,training.seed=-?1) \(error\)", last)) == failed
    assert "Traceback" not in done.stderr


@pytest.mark.process
def test_another_configuration_in_the_folder_is_refused_by_jobs_too(tmp_path: Path) -> None:
    arguments = ("-m", "optim=ga", *FAST, "hydra.sweep.dir=sweep", *LAUNCHERS["joblib"])
    assert run("llama_ft.train", *arguments, cwd=tmp_path).returncode == 0
    done = run("llama_ft.train", *arguments, "training.lr=0.5", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds a run with another configuration: training.lr" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.process
@pytest.mark.parametrize("name", ["submitit_local", "submitit_slurm"])
def test_a_job_that_its_queue_stops_saves_and_goes_on_when_it_is_started_again(name: str, tmp_path: Path) -> None:
    env = cluster(tmp_path / "cluster") | injected(tmp_path / "inject", into="sweep/lora ", code=SLOW)
    process = start(tmp_path, *LAUNCHERS[name], "optim=lora", env=env)
    row = tmp_path / "sweep" / "lora"
    try:
        until(lambda: (row / "metrics.jsonl").exists() and (row / "metrics.jsonl").stat().st_size, process)
        for pid in jobs_below(tmp_path / "sweep"):  # as SLURM does, all processes of the job
            os.kill(pid, signal.SIGUSR2)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output + errors
    sweep = Sweep(tmp_path / "sweep", (), subprocess.CompletedProcess([], 0))
    result = sweep.results()["lora"]
    assert (result["status"], result["stopped_by"]) == ("ok", None)
    assert 0 < result["resumed_at_step"] < 9
    if name == "submitit_slurm":
        assert (tmp_path / "cluster" / "requeued").read_text() == "requeue 7\n"


def jobs_below(sweep_dir: Path) -> Iterator[int]:
    """The processes of a sweep's jobs: submitit's, and the runs'."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")
        except OSError:
            continue
        if ("submitit.core._submit" in words or CHILD in words) and any(str(sweep_dir) in word for word in words):
            yield int(entry.parent.name)


def test_a_batch_script_asks_for_what_is_documented(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    wanted = ("partition=gpu", "gpus_per_node=1", "timeout_min=240", "array_parallelism=8", "max_num_timeout=20")
    overrides = ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{each}" for each in wanted)]
    launcher = composed("train", overrides, with_hydra=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    from submitit.slurm.slurm import _make_sbatch_string

    keys = ("partition", "gpus_per_node", "array_parallelism", "signal_delay_s")
    text = _make_sbatch_string(
        "run", folder=str(tmp_path), map_count=100, time=launcher.timeout_min, **{key: launcher[key] for key in keys}
    )
    for line in ("partition=gpu", "gpus-per-node=1", "time=240", "array=0-99%8", "signal=USR2@120"):
        assert f"#SBATCH --{line}\n" in text
    assert launcher.max_num_timeout == 20
    assert submitit.__version__


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_whoever_handled_a_signal_before_does_so_once_the_run_is_saved(number: signal.Signals) -> None:
    order: list[str] = []

    @queue_signals_raised()
    def stopped() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), number)  # again, while it is being saved
            order.append("saved")

    before = signal.signal(number, lambda *_: order.append("requeued"))
    try:
        with pytest.raises(StoppedByQueue):
            stopped()
        assert order == ["saved", "requeued"]
        os.kill(os.getpid(), number)
        assert order == ["saved", "requeued", "requeued"]
    finally:
        signal.signal(number, before)


# --------------------------------------------------------------------------------------------------------------- cards

HOLDER = """
import sys, time
from pathlib import Path
from llama_ft.launch.cards import hold
held = hold({0: "GPU-a", 1: "GPU-b"}, 1, Path(sys.argv[1]), lambda line: print(line, flush=True))
(number,) = held
print(number, flush=True)
time.sleep(60)
"""


@pytest.mark.process
def test_runs_take_different_cards_and_a_killed_one_frees_its_own(tmp_path: Path) -> None:
    """Three runs on a machine with two cards."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    runs = []
    try:
        said = []
        for _ in range(3):
            runs.append(subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True))
            said.append(runs[-1].stdout.readline().strip())
        assert said == ["0", "1", "waiting: the 2 GPUs are all taken by other runs; gpu.shared=true shares one"]
        runs[1].kill()
        assert runs[2].stdout.readline().strip() == "1"
    finally:
        for each in runs:
            each.kill()
            each.communicate()


def test_one_card_is_waited_for_where_it_alone_may_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((first, held),) = cards.hold({0: "a", 1: "b"}, 1, tmp_path, pytest.fail).items()
    lines: list[str] = []
    monkeypatch.setattr(cards.time, "sleep", lambda _: held.close())
    ((again, other),) = cards.hold({0: "a"}, 1, tmp_path, lines.append).items()  # gpu.index=0
    assert (first, again) == (0, 0)
    assert lines == ["waiting: the GPU is taken by other runs; gpu.shared=true shares one"]
    with (tmp_path / "b").open("ab") as free:
        assert try_lock(free)
    other.close()


def test_a_split_run_takes_all_of_its_cards_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three, waits = {0: "a", 1: "b", 2: "c"}, list[bool]()
    held = cards.hold(three, 2, tmp_path, pytest.fail)
    assert list(held) == [0, 1]

    def later(_: float) -> None:
        with (tmp_path / "c").open("ab") as free:
            waits.append(try_lock(free))  # the one that was free has been given back
        held[1].close()

    monkeypatch.setattr(cards.time, "sleep", later)
    others = cards.hold(three, 2, tmp_path, lambda _: None)
    assert (list(others), waits) == ([1, 2], [True])
    with pytest.raises(UserError, match="4 GPUs of one kind are needed, and this machine has 3"):
        cards.hold(three, 4, tmp_path, pytest.fail)


@pytest.mark.parametrize(
    ("visible", "per_node", "on_cpu", "problem"),
    [
        (None, None, False, "shows its jobs no GPU by default: give hydra.launcher.gpus_per_node=N"),
        ("2,3", 2, False, "CUDA_VISIBLE_DEVICES=2,3 selects some: use hydra/launcher=joblib"),
        (None, 2, False, None),
        ("", None, False, None),
        ("2,3", None, True, None),
    ],
)
def test_jobs_of_this_machine_see_the_gpus_that_they_may(
    visible: str | None, per_node: int | None, on_cpu: bool, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hydra_keys, "may_have_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launcher = OmegaConf.create({"gpus_per_node": per_node})
    with pytest.raises(UserError, match=problem) if problem else nullcontext():
        hydra_keys.check_gpus_of_jobs(launcher, on_cpu)
