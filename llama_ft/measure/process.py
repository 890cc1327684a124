"""Running one run in a process of its own, watching it, and writing its result if it could not."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from llama_ft.config import PACKAGE_DIR, TrainConfig
from llama_ft.files import write_text
from llama_ft.measure.result import (
    ADAPTER_FILE,
    CONFIG_FILE,
    LOG_FILE,
    MB,
    METRICS_FILE,
    OUT_OF_MEMORY_TEXT,
    RESULT_FILE,
    WEIGHTS_FILE,
    new_result,
    read_result,
    write_result,
)

POLL_SECONDS = 0.1
# Threads of libgomp wait for each other by spinning, for milliseconds, on the core that the other may need: beside one
# busy process a small model on two cores takes 40 times longer. Spinning less, it takes 3 times longer.
THREADS_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
SECONDS_TO_STOP = 15
NEAR_LIMIT = 0.9  # a killed process that held this share of the memory there is was killed for memory


class Listener(Protocol):
    """Hears of a run's progress while it runs."""

    def message(self, line: str) -> None:
        """A line that the run printed."""
        ...

    def step(self, metrics: dict[str, Any]) -> None:
        """A line of its metrics.jsonl."""
        ...


class MetricsReader:
    """Reads the lines that have been added to a growing file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: IO[str] | None = None
        self._partial = ""

    def new_lines(self) -> list[dict[str, Any]]:
        """The whole lines since the last call."""
        if self._stream is None:
            if not self._file.exists():
                return []
            self._stream = self._file.open(encoding="utf-8")
        *lines, self._partial = (self._partial + self._stream.read()).split("\n")
        return [json.loads(line) for line in lines]


def run_in_child(
    config: TrainConfig, config_yaml: str, run_dir: Path, command: str, listener: Listener
) -> dict[str, Any]:
    """Run to the end, in whichever way it ends, and return its result.

    Args:
        config_yaml: the resolved config as YAML, for the run's folder.
        command: what the user typed, for the result.

    Raises:
        KeyboardInterrupt: passed on after the child has stopped and its result is written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for stale in (RESULT_FILE, METRICS_FILE, LOG_FILE, ADAPTER_FILE, WEIGHTS_FILE):
        (run_dir / stale).unlink(missing_ok=True)
    write_text(run_dir / CONFIG_FILE, config_yaml)
    kills_before = oom_kills()
    path = os.pathsep.join(filter(None, (str(PACKAGE_DIR.parent), os.environ.get("PYTHONPATH"))))
    with (run_dir / LOG_FILE).open("ab") as log, interrupts_held_back():
        child = subprocess.Popen(
            [sys.executable, "-m", "llama_ft.measure.child", str(run_dir), command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on
            env=THREADS_ENVIRONMENT | os.environ | {"PYTHONPATH": path},
        )
    interrupted: KeyboardInterrupt | None = None
    try:
        rss, data = watch(child, run_dir, listener)
    except KeyboardInterrupt as error:
        interrupted, rss, data = error, 0, 0
    finally:
        stop(child)
    result = read_result(run_dir) or ending_of_killed(
        config, run_dir, command, child, rss, kills_before, interrupted, data
    )
    if interrupted:
        raise interrupted
    return result


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A process started inside begins with interrupts held back, until it lets them through itself."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def watch(child: subprocess.Popen[bytes], run_dir: Path, listener: Listener) -> tuple[int, int]:
    """Pass on messages and metrics until the child ends; the last resident set and data segment seen, in bytes."""
    lines: list[str] = []

    def copy_output() -> None:
        assert child.stdout is not None
        with (run_dir / LOG_FILE).open("ab", buffering=0) as log:  # beside what the child itself writes to it
            for raw in child.stdout:
                log.write(raw)
                lines.append(raw.decode(errors="replace").rstrip())

    copier = threading.Thread(target=copy_output, daemon=True)
    copier.start()
    metrics = MetricsReader(run_dir / METRICS_FILE)
    rss, data, ended = 0, 0, False
    while not ended:
        ended = child.poll() is not None
        if ended:
            copier.join()
        else:
            rss, data = resident_bytes(child.pid) or rss, data_bytes(child.pid) or data
            time.sleep(POLL_SECONDS)
        while lines:
            listener.message(lines.pop(0))
        for line in metrics.new_lines():
            listener.step(line)
    return rss, data


def stop(child: subprocess.Popen[bytes]) -> None:
    """Make sure that the child has ended: ask it to, then kill it."""
    for _ in range(SECONDS_TO_STOP):
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(1)
    child.kill()
    child.wait()
    if child.stdin is not None:
        child.stdin.close()


def ending_of_killed(
    config: TrainConfig,
    run_dir: Path,
    command: str,
    child: subprocess.Popen[bytes],
    rss: int,
    kills_before: int,
    interrupted: KeyboardInterrupt | None,
    data: int = 0,
) -> dict[str, Any]:
    """Write the result of a child that could not: killed, for memory where there is evidence, or crashed."""
    log_file = run_dir / LOG_FILE
    log = log_file.read_text(encoding="utf-8", errors="replace") if log_file.exists() else ""
    how = f"by signal {-child.returncode}" if child.returncode < 0 else f"with exit status {child.returncode}"
    killed_for_memory = child.returncode == -signal.SIGKILL and (
        oom_kills() > kills_before or rss > NEAR_LIMIT * memory_there_is()
    )
    limit = config.measure.memory_limit_mb
    # Code that does not check its allocations crashes where they fail.
    crashed_at_limit = child.returncode < 0 and limit is not None and data > NEAR_LIMIT * limit * MB
    if interrupted:
        status, error = "interrupted", "interrupted, and did not stop by itself in time"
    elif killed_for_memory:
        status, error = "oom", "killed by the operating system, which was out of memory"
    elif crashed_at_limit or OUT_OF_MEMORY_TEXT.search(log):
        status, error = "oom", f"out of memory: the process ended {how}"
    elif child.returncode in (-signal.SIGKILL, -signal.SIGTERM):
        status, error = "killed", f"killed {how}; no sign that memory was the reason"
    else:
        status, error = "error", f"the run's process ended {how}; see {log_file}"
    result = new_result(config, command) | {"status": status, "error": error}
    write_result(run_dir, result)
    return result


def resident_bytes(pid: int) -> int:
    """Resident set of a process; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def data_bytes(pid: int) -> int:
    """Data segment of a process, what RLIMIT_DATA limits; 0 where the system does not tell."""
    with suppress(OSError):
        if match := re.search(r"^VmData:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return int(match[1]) * 1024
    return 0


def _cgroup_file(name: str) -> Path:
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return Path("/sys/fs/cgroup") / name
    return Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/") / name


def oom_kills() -> int:
    """Processes of our control group that were killed for memory so far; 0 where the system does not tell."""
    try:
        fields = _cgroup_file("memory.events").read_text().split()
        return int(fields[fields.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return 0


def memory_there_is() -> float:
    """Bytes that this process could have at most: the machine's or the control group's; infinite where unknown."""
    sizes = [float("inf")]
    with suppress(OSError, ValueError):
        sizes.append(float(_cgroup_file("memory.max").read_text()))  # may be the word max
    with suppress(OSError, ValueError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes)
