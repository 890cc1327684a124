"""The processes of one run that is split over several: started, watched, interrupted, failing, on several machines."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT, environment, injected

from llama_ft.config import ParallelConfig, TrainConfig, UserError
from llama_ft.config.parallel import Strategy
from llama_ft.launch import machines
from llama_ft.launch.endings import Ending, root_of
from llama_ft.records.result import results_below

CHILD = "llama_ft.launch.child"
STAND_IN = f"""
import importlib.util
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "llama_ft.launch.run":
            return importlib.util.spec_from_file_location(name, {str(CHECKOUT / "tests" / "helpers" / "stand_in.py")!r})
sys.meta_path.insert(0, Finder())
"""


class Command:
    """A split run of stand-ins."""

    def __init__(self, cwd: Path, *overrides: str, folder: str = "run", **variables: str) -> None:
        self.run_dir = cwd / folder
        env = injected(cwd / "inject", into=CHILD, code=STAND_IN) | variables
        arguments = ("parallel=ddp", "parallel.processes=2", "parallel.timeout_s=4", "tracker=disabled", "gpu=cpu")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llama_ft.train", *arguments, f"hydra.run.dir={self.run_dir}", *overrides],
            cwd=cwd,
            env=environment(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.output = ""

    def ranks(self, *wanted: int) -> list[int]:
        """The process ids of ranks that have begun to train."""
        files = [self.run_dir / f"step_{rank}" for rank in wanted or (0, 1)]
        wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        return [int(file.read_text().split()[0]) for file in files]

    def finish(self, seconds: float = 40) -> int:
        try:
            self.output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            print((self.run_dir / "train.log").read_text())
            raise
        return self.process.returncode

    def result(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "result.json").read_text())

    @property
    def ended(self) -> tuple[str, str]:
        return self.result()["status"], self.result()["error"]


def wait_for(condition: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """A process's children, and theirs."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in children for each in (int(child), *descendants(int(child)))]


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("finds the processes through Linux's /proc")
    commands: list[Command] = []

    def start(*overrides: str, **options: str) -> Command:
        commands.append(Command(tmp_path, *overrides, **options))
        return commands[-1]

    yield start
    for command in commands:
        if command.process.poll() is None:
            left = descendants(command.process.pid)
            for pid in (command.process.pid, *left):
                os.kill(pid, signal.SIGKILL)
        command.process.wait()


# ------------------------------------------------------------------------------------------------------------ together


@pytest.mark.process
def test_ranks_run_together_and_one_speaks(started: Callable[..., Command]) -> None:
    command = started(STEPS="3")
    assert command.finish() == 0, command.output
    assert command.ended == ("ok", None)
    assert command.output.count("2 ranks") == 1
    assert "processes: 2, CPU threads in each: 1" in command.output
    assert "rank 0 prints this" in command.output
    assert "rank 1 prints this" not in command.output
    assert "rank 1 prints this" in (command.run_dir / "train.log").read_text()
    assert {file.name for file in command.run_dir.iterdir()} == {"config.yaml", "train.log", "result.json"} | {
        f"step_{rank}" for rank in (0, 1)
    }


# ------------------------------------------------------------------------------------------------- stopped from outside


@pytest.mark.process
def test_an_interrupt_saves_once_and_all_stop_after_the_same_step(started: Callable[..., Command]) -> None:
    command = started("training.save_every=1000")
    ranks = command.ranks()
    command.process.send_signal(signal.SIGINT)
    assert command.finish() == 130
    assert command.ended == ("interrupted", "interrupted during training")
    saved = {(command.run_dir / f"saved_{rank}").read_text() for rank in (0, 1)}
    assert len(saved) == 1
    assert not any(map(is_alive, ranks))
    assert "Traceback" not in command.output


@pytest.mark.process
def test_a_queues_signal_to_all_processes_saves_once(started: Callable[..., Command]) -> None:
    command = started("training.save_every=1000")
    command.ranks()
    for pid in (command.process.pid, *descendants(command.process.pid)):
        os.kill(pid, signal.SIGTERM)
    assert command.finish() == 130
    assert command.ended[0] == "interrupted"
    assert command.result()["stopped_by"] == "SIGTERM"
    assert len({(command.run_dir / f"saved_{rank}").read_text() for rank in (0, 1)}) == 1


@pytest.mark.process
def test_an_interrupt_before_training_ends_ranks_that_are_busy(started: Callable[..., Command]) -> None:
    command = started(
        "parallel.timeout_s=100", "training.save_every=1000", FAIL="1 start", FAULT="while True: time.sleep(0.1)"
    )
    wait_for(lambda: len(descendants(command.process.pid)) == 3)
    processes = descendants(command.process.pid)
    wait_for(lambda: all("libgloo" in text or "libtorch" in text for text in map(maps, processes)))
    command.process.send_signal(signal.SIGINT)
    assert command.finish() == 130
    assert command.ended[0] == "interrupted"
    assert not any(map(is_alive, processes))


@pytest.mark.process
def test_a_second_interrupt_ends_what_hangs_at_once(started: Callable[..., Command]) -> None:
    command = started("training.save_every=1000", "parallel.timeout_s=100")
    ranks = command.ranks()
    processes = descendants(command.process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    command.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGINT)
    assert command.finish(seconds=10) == 130
    assert command.ended[0] == "interrupted"
    assert not any(map(is_alive, processes))


@pytest.mark.process
@pytest.mark.parametrize("whose", ["command", "agent"])
def test_no_rank_outlives_a_killed_parent(started: Callable[..., Command], whose: str) -> None:
    command = started()
    ranks = command.ranks()
    agent = descendants(command.process.pid)[0]
    os.kill(command.process.pid if whose == "command" else agent, signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, [agent, *ranks])), 15)
    if whose == "agent":
        assert command.finish() == 1
    assert command.ended[0] == "interrupted"


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.process
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(started: Callable[..., Command], rank: int) -> None:
    command = started()
    ranks = command.ranks()
    os.kill(ranks[rank], signal.SIGKILL)
    assert command.finish(seconds=15) == 1
    assert command.ended == ("killed", f"rank {rank}: killed by signal 9; no sign that memory was the reason")
    assert not any(map(is_alive, ranks))
    assert command.ended[1] in command.output


@pytest.mark.process
def test_a_rank_that_hangs_is_named(started: Callable[..., Command]) -> None:
    command = started()
    ranks = command.ranks()
    os.kill(ranks[0], signal.SIGSTOP)
    begin = time.monotonic()
    assert command.finish() == 1
    assert time.monotonic() - begin < 4 + 12
    assert command.ended[0] == "error"
    assert command.ended[1].startswith("rank 0: did not answer for 4 s")
    assert not any(map(is_alive, ranks))


FAULTS = {
    "out of memory": ("raise MemoryError", 0, "oom", "rank 1: out of memory during training: MemoryError"),
    "a fault": ("raise ValueError('odd')", 1, "error", "rank 1: ValueError during training: odd (traceback"),
    "the user's": ("raise UserError('give another')", 1, "error", "rank 1: give another"),
    "a crash": ("os.abort()", 1, "error", "rank 1: the run's process ended by signal 6"),
}


@pytest.mark.process
@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_cause_is_reported_and_not_what_it_does_to_the_others(
    started: Callable[..., Command], fault: str
) -> None:
    code, exit_code, status, error = FAULTS[fault]
    command = started(FAIL="1 training", FAULT=f"from llama_ft.config import UserError\n{code}")
    assert command.finish(seconds=15) == exit_code
    assert command.ended[0] == status
    assert command.ended[1].startswith(error)
    assert "Traceback" not in command.output


@pytest.mark.process
def test_a_rank_that_never_joins_is_named(started: Callable[..., Command]) -> None:
    command = started(FAIL="1 start", FAULT="time.sleep(100)")
    assert command.finish() == 1
    assert command.ended[1].startswith("rank 1: did not answer for 4 s")


@pytest.mark.process
def test_a_wrong_file_is_said_as_without_ranks(started: Callable[..., Command]) -> None:
    command = started("data.path=nowhere.json")
    assert command.finish() != 0
    assert "rank" not in command.output.splitlines()[-1]
    assert "nowhere.json" in command.output.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------- several machines


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def two(started: Callable[..., Command]) -> Callable[..., list[Command]]:
    """Two machines with a rank each, which are this one; with a shared disk or without."""

    def start(*overrides: str, shared: bool = True, **variables: str) -> list[Command]:
        meeting = ("parallel.nodes=2", f"parallel.rendezvous=localhost:{free_port()}", *overrides)
        first = started(*meeting, **variables)
        wait_for((first.run_dir / "config.yaml").exists)  # is the first, then
        return [first, started(*meeting, folder="run" if shared else "other", **variables)]

    return start


@pytest.mark.process
@pytest.mark.parametrize("shared", [False, True])
def test_two_machines_run_together(two: Callable[..., list[Command]], shared: bool) -> None:
    commands = two(STEPS="3", shared=shared)
    assert [command.finish() for command in commands] == [0, 0], [command.output for command in commands]
    first, other = commands
    assert first.ended == ("ok", None)
    assert "2 ranks" in first.output
    assert "2 ranks" not in other.output
    assert "the results are on the first machine" in other.output
    log = other.run_dir / f"other_machine_{socket.gethostname()}" / "train.log"
    assert "rank 1 prints this" in log.read_text()
    assert len(results_below(first.run_dir)) == 1


@pytest.mark.process
def test_a_rank_killed_on_another_machine_ends_both(two: Callable[..., list[Command]]) -> None:
    commands = two()
    os.kill(commands[0].ranks()[1], signal.SIGKILL)
    assert [command.finish(20) for command in commands] == [1, 1]
    sentence = "rank 1: killed by signal 9; no sign that memory was the reason"
    assert commands[0].ended == ("killed", sentence)
    assert sentence in commands[1].output


@pytest.mark.process
def test_an_interrupt_on_either_machine_saves_on_both(two: Callable[..., list[Command]]) -> None:
    commands = two("training.save_every=1000")
    commands[0].ranks()
    commands[1].process.send_signal(signal.SIGINT)
    assert [command.finish(20) for command in commands] == [1, 130]
    assert commands[0].ended == ("interrupted", "interrupted during training")
    assert len({(commands[0].run_dir / f"saved_{rank}").read_text() for rank in (0, 1)}) == 1


@pytest.mark.process
def test_a_machine_that_is_lost_ends_the_run(two: Callable[..., list[Command]]) -> None:
    first, other = two(shared=False)
    first.ranks()
    for pid in (other.process.pid, *descendants(other.process.pid)):
        os.kill(pid, signal.SIGKILL)
    assert first.finish() == 1
    assert first.ended[1] == "rank 1: its machine does not answer"


@pytest.mark.process
def test_a_machine_alone_says_where_it_waited(started: Callable[..., Command]) -> None:
    port = free_port()
    command = started("parallel.nodes=2", f"parallel.rendezvous=localhost:{port}", "parallel.timeout_s=1")
    assert command.finish() == 1
    assert f"1 came to localhost:{port} within 1 s" in command.ended[1]


@pytest.mark.process
def test_another_command_on_the_second_machine_is_refused(started: Callable[..., Command]) -> None:
    meeting = ("parallel.nodes=2", f"parallel.rendezvous=localhost:{free_port()}", "parallel.timeout_s=20")
    first = started(*meeting)
    wait_for((first.run_dir / "config.yaml").exists)
    other = started(*meeting, "training.lr=0.5", folder="other")
    assert other.finish() == 1
    assert "the run on the first machine, localhost, is another one" in other.output


SLURM = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "gpu[07-08,11]-ib,login1", "SLURM_NNODES": "4"}


def test_slurm_says_where_machines_meet() -> None:
    assert machines.meeting_point(None, 4, SLURM) == ("gpu07-ib", 20_123)
    assert machines.meeting_point("other:1234", 4, SLURM) == ("other", 1234)
    assert machines.first_host("a1,a2") == "a1"
    assert machines.first_host("node[3,5]") == "node3"
    assert machines.first_host("node[003-128]") == "node003"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "parallel.rendezvous=HOST:PORT"),
        (SLURM | {"SLURM_NNODES": "2"}, "SLURM gave this job 2"),
        (SLURM | {"SLURM_NTASKS": "8"}, "--ntasks-per-node=1"),
        (SLURM | {"SLURM_LOCALID": "1"}, "--ntasks-per-node=1"),
    ],
)
def test_a_wrong_start_under_slurm_is_explained(variables: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        machines.meeting_point(None, 4, variables)


# ------------------------------------------------------------------------------------------------------ which was first


def test_a_cause_comes_before_its_consequences() -> None:
    lost = Ending(0, "error", "connection closed", "others", 1.0)
    hung = Ending(3, "error", "did not answer", "silent", 9.0)
    stopped = Ending(0, "interrupted", "interrupted during training", "interrupted", 9.0)
    first, later = (Ending(rank, "oom", "out of memory", "own", time_s) for rank, time_s in ((2, 5.0), (1, 6.0)))
    assert root_of([]) is None
    assert root_of([lost]) is lost
    assert root_of([lost, hung]) is hung
    assert root_of([lost, hung, stopped]) is stopped
    assert root_of([lost, hung, stopped, later, first]) is first
    assert first.sentence == "rank 2: out of memory"
    assert stopped.sentence == "interrupted during training"


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, tiny_config: TrainConfig) -> None:
    from llama_ft.launch import meeting

    monkeypatch.setattr(meeting, "why_no_gpu", lambda: None)
    monkeypatch.setattr(meeting.torch.cuda, "device_count", lambda: 2)
    parallel = ParallelConfig(Strategy.ddp, processes=8, nodes=2)
    with pytest.raises(UserError, match="4 on this machine, one per GPU, and PyTorch sees 2"):
        meeting.check_gpus(replace(tiny_config, parallel=parallel))
    meeting.check_gpus(replace(tiny_config, parallel=replace(parallel, processes=4)))
