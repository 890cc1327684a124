"""Run one run in its own process, watch it, and write its result if it could not."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from llama_ft.config import PACKAGE_DIR, DeviceChoice, TrainConfig
from llama_ft.files import write_text
from llama_ft.launch import CHECK_FIT, END_NOW
from llama_ft.launch.endings import Seen, ending_of_killed
from llama_ft.launch.interrupts import StoppedByQueue, interrupts_held_back
from llama_ft.launch.machines import Place
from llama_ft.records.metrics import METRICS_FILE, Metrics, parse_line
from llama_ft.records.result import CONFIG_FILE, LOG_FILE, Result, new_result, read_result, write_result
from llama_ft.system import Log, is_wsl, n_cores, oom_kills

POLL_SECONDS = 0.1
RUN_ENVIRONMENT = {
    # libgomp's threads wait for each other by spinning for milliseconds on a core that the other may need: next to one
    # busy process a small model on two cores takes 40 times longer. With less spinning, it takes 3 times longer.
    "GOMP_SPINCOUNT": "10000",
    # glibc would return free memory to the system, and each step would need new pages, which cost a tenth of its time:
    # it must keep them. Blocks from 16 MiB on are still separate, since smaller ones put in their place would leave no
    # room for the next, and a run's memory would grow; as huge pages (Linux, glibc 2.35) new ones cost less.
    "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={2**24}:glibc.malloc.trim_threshold={2**46}",
}
# The allocator then maps pages at the end of one range of addresses, instead of new segments whose remainders fit
# nothing: it reserves less, and what the planner's model of it predicts (`planning/allocator.py`). Under Windows the
# driver may lack the calls for it, and the first allocation fails (pytorch/pytorch#192330).
ALLOCATOR_ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # old and new names
SECONDS_TO_STOP = 15
SECONDS_TO_KILL = 10  # for PyTorch's agent to kill its ranks
SECONDS_FOR_THE_LAST = 30  # for an earlier run in the same folder, whose parent was killed, to stop by itself

OnStep = Callable[[Metrics], None]


def run_in_child(config: TrainConfig, place: Place, command: str, check_fit: bool, log: Log, on_step: OnStep) -> Result:
    """Do a run to its end, however it ends, and return its result.

    Args:
        place: the folder that this machine works in, locked and cleared; the lock lasts until both processes are gone.
        command: what the user typed, for the result.
        check_fit: refuse a run that would not fit on the GPU here according to its plan.
        log: is given the lines that the run prints.
        on_step: is given the steps in its metrics.jsonl.

    Raises:
        KeyboardInterrupt: Ctrl-C or a queue's signal, passed on after the child has stopped and its result is written.
    """
    run_dir = place.folder
    write_text(run_dir / CONFIG_FILE, config.to_yaml())
    metrics_file = run_dir / METRICS_FILE
    kills_before, before, seen = oom_kills(), changed_ns(metrics_file), Seen()
    child = start(config, place, command, check_fit, log)
    patience: float = SECONDS_TO_STOP
    try:
        watch(child, run_dir, seen, log, on_step)
    except KeyboardInterrupt as interrupt:
        seen.interrupt = interrupt
        if config.training.saves_when_interrupted and changed_ns(metrics_file) != before:  # else it stops at once
            log("stopping after this optimizer step, and saving it; Ctrl-C again stops at once")
            patience = math.inf
    finally:
        stop(child, patience, seen.interrupt)
    result = read_result(run_dir)
    if result is None:
        result, limit_mib = new_result(config, command), config.measure.memory_limit_mib
        seen.was_oom_kill = oom_kills() > kills_before
        result.status, result.error = ending_of_killed(child.returncode, seen, limit_mib, run_dir / LOG_FILE)
        result.stopped_by = seen.interrupt.name if isinstance(seen.interrupt, StoppedByQueue) else None
        write_result(run_dir, result)
    if seen.interrupt:
        if result.error:
            log(f"{run_dir}: {result.error}")
        raise seen.interrupt
    return result


def changed_ns(file: Path) -> int | None:
    """Time of a file's last change in nanoseconds; None if there is no file."""
    return file.stat().st_mtime_ns if file.exists() else None


def start(config: TrainConfig, place: Place, command: str, check_fit: bool, log: Log) -> subprocess.Popen[bytes]:
    """Start the child (PyTorch's agent for a split run) in its own session, since Ctrl-C must reach only us."""
    parallel, folder, descriptors = config.parallel, str(place.folder), [place.lock]
    env = child_environment(config.gpu.device is DeviceChoice.cpu, parallel.per_machine)
    program = ["llama_ft.launch.child", folder, folder, command]
    if parallel.is_split:
        listener = place.listener.fileno() if place.listener else None
        descriptors += [listener] if listener is not None else []
        program = ["llama_ft.launch.agent", folder, command, str(listener).lower()]
        where = f" on each of {parallel.nodes} machines" if parallel.nodes > 1 else ""
        threads = env.get("OMP_NUM_THREADS", "all")
        log(f"processes: {parallel.per_machine}{where}, CPU threads in each: {threads}")
    program = [sys.executable, "-m", *program, *([CHECK_FIT] if check_fit else [])]
    pipe = subprocess.PIPE
    with (place.folder / LOG_FILE).open("ab") as stderr, interrupts_held_back():
        return subprocess.Popen(
            program, stdin=pipe, stdout=pipe, stderr=stderr, start_new_session=True, pass_fds=descriptors, env=env
        )


def child_environment(on_cpu: bool, n_processes: int = 1) -> dict[str, str]:
    """Our environment with the variables that a run needs; the user's own stay. Processes share the cores."""
    path = os.pathsep.join(filter(None, (str(PACKAGE_DIR.parent), os.environ.get("PYTHONPATH"))))
    set_by_user = any(name in os.environ for name in ALLOCATOR_VARIABLES)
    allocator = {} if set_by_user or is_wsl() else ALLOCATOR_ENVIRONMENT
    # We read its lines, whatever the terminal's encoding is.
    ours = {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    if on_cpu:  # on a GPU that it sees, PyTorch 2.13 makes a context of hundreds of MiB when an optimizer steps
        ours["CUDA_VISIBLE_DEVICES"] = ""
    threads = {"OMP_NUM_THREADS": str(max(1, n_cores() // n_processes))} if n_processes > 1 else {}
    return RUN_ENVIRONMENT | allocator | threads | os.environ | ours


def watch(child: subprocess.Popen[bytes], run_dir: Path, seen: Seen, log: Log, on_step: OnStep) -> None:
    """Pass on messages and metrics until the child ends, noting its memory in `seen`."""
    lines: list[str] = []

    def copy_output() -> None:
        assert child.stdout is not None
        with (run_dir / LOG_FILE).open("ab", buffering=0) as log_file:  # the child writes to it too
            for raw in child.stdout:
                with suppress(OSError):  # if the disk is full, the run must not wait for a reader that has failed
                    log_file.write(raw)
                lines.append(raw.decode(errors="replace").rstrip())

    copier = threading.Thread(target=copy_output, daemon=True)
    copier.start()
    steps, ended = new_steps(run_dir / METRICS_FILE), False
    while not ended:
        ended = child.poll() is not None
        if ended:
            copier.join()
        else:
            seen.look_at(child.pid)
            time.sleep(POLL_SECONDS)
        said = lines[:]
        del lines[: len(said)]
        for step in next(steps):  # first, since the lines may be about them
            on_step(step)
        for line in said:
            log(line)


def new_steps(file: Path) -> Iterator[list[Metrics]]:
    """Yield the steps whose lines have been completed in a growing file since the last time."""
    while not file.exists():
        yield []
    partial = ""
    with file.open(encoding="utf-8") as stream:
        while True:
            *lines, partial = (partial + stream.read()).split("\n")
            yield [parse_line(line, str(file)) for line in lines]


def stop(child: subprocess.Popen[bytes], patience: float, interrupt: KeyboardInterrupt | None) -> None:
    """Make sure that the child has ended: interrupt it, then, after `patience` seconds or another Ctrl-C, kill it."""
    end = time.monotonic() + patience
    number = interrupt.number if isinstance(interrupt, StoppedByQueue) else signal.SIGINT
    with suppress(KeyboardInterrupt):
        while child.poll() is None and time.monotonic() < end:
            child.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(1)
    child.send_signal(END_NOW)  # a run's process ends at once, PyTorch's agent kills its ranks first
    with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        child.wait(SECONDS_TO_KILL)
    child.kill()
    child.wait()
    if child.stdin is not None:
        child.stdin.close()
