"""The processes of one run that is split over several: started, watched, interrupted, failing, on several machines."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT, environment, injected

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
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named(started: Callable[..., Command], rank: int) -> None:
    command = started()
    ranks = command.ranks()
    os.kill(ranks[rank], signal.SIGSTOP)
    begin = time.monotonic()
    assert command.finish() == 1
    assert time.monotonic() - begin < 4 + 12
    assert command.ended[0] == "error"
    assert command.ended[1].startswith(f"rank {rank}: did not answer for 4 s")
    assert not any(map(is_alive, ranks))


FAULTS = {
    "out of memory": ("raise MemoryError", 0, "oom", "rank 1: out of memory during training: MemoryError"),
    "a fault": ("raise ValueError('odd')", 1, "error", "rank 1: ValueError during training: odd (traceback"),
    "the user's": ("raise UserError('give another')", 1, "error", "rank 1: give another"),
    "a crash": ("os.abort()", 1, "error", "rank 1: the run's process ended by signal 6"),
    "an exit": ("os._exit(3)", 1, "error", "rank 1: the run's process ended with exit status 3"),
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
