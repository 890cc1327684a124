"""`python -m llama_ft.launch.agent RUN_DIR COMMAND LISTENER [check-fit]`: run the ranks of a run on this machine.

`llama_ft.launch.process` starts it in place of the single child of a run that is not split. PyTorch's elastic agent,
which `torch.distributed.run` uses too, starts the ranks and sets their variables. Standard output is rank 0's.
"""

import inspect
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import Any, cast

from torch._C._distributed_c10d import Store
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from llama_ft.config import TrainConfig, read_config
from llama_ft.launch import END_NOW
from llama_ft.launch.cards import take_cards
from llama_ft.launch.child import failure, seconds_to_stop, stop_with_parent
from llama_ft.launch.endings import Ending, Seen, ending_of_killed
from llama_ft.launch.interrupts import ALL_SIGNALS, interrupts_held_back
from llama_ft.launch.meeting import Meeting, check_gpus, meet
from llama_ft.records.result import CONFIG_FILE, LOG_FILE, new_result, read_result, write_result
from llama_ft.system import oom_kills

SECONDS_TO_END = 5  # for the other ranks to notice that one has failed, and to report how they end
SECONDS_TO_DIE = 2  # for a rank that is told to end
LOOK_SECONDS = 0.2
FAILING = "failing"  # a key that exists once a rank has failed, on whichever machine
NCCL_GAVE_UP = "Watchdog caught collective operation timeout"  # NCCL aborts the process: another rank did not come


class Agent(LocalElasticAgent):
    """PyTorch's agent. Once a rank has failed, it lets the others end and records how; none is restarted."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, store: Store, config: TrainConfig, log_file: Path):
        timeout = config.parallel.timeout_s
        takes = inspect.signature(LocalElasticAgent).parameters
        since_2_12: Any = {"shutdown_timeout": SECONDS_TO_DIE} if "shutdown_timeout" in takes else {}
        super().__init__(spec, logs, exit_barrier_timeout=timeout, **since_2_12)
        self.store, self.config, self.log_file = store, config, log_file
        self.kills_before = oom_kills()
        self.seen: dict[int, Seen] = {}
        self.endings: dict[int, Ending] = {}
        self.failed_at: float | None = None  # when a rank had failed, here or elsewhere
        self.done_at: float | None = None  # when rank 0 was done

    @property
    def ranks(self) -> dict[int, tuple[Popen[bytes], Path]]:
        """By rank, the process that was started, and the file in which it says how it failed."""
        if (context := cast(SubprocessContext | None, self._pcontext)) is None:
            return {}
        return {
            each.global_rank: (context.subprocess_handlers[n].proc, Path(context.error_files[n]))
            for n, each in enumerate(self.get_worker_group().workers)
        }

    def interrupt(self, number: int, _: FrameType | None) -> None:
        """Pass an interrupt on to the first rank here, which tells the others; raise it if no rank has started."""
        if not self.ranks:
            raise KeyboardInterrupt
        self.send(min(self.ranks), number)

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a rank, unless it has ended."""
        process, _ = self.ranks[rank]
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with interrupts_held_back():  # until a rank handles them
            return super()._start_workers(worker_group)  # type: ignore[no-any-return]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self._look()
        if self._is_failing(codes):
            return self._wait_for_the_others(codes)
        if all(code == 0 for code in codes.values()):
            return super()._monitor_workers(worker_group)  # type: ignore[no-any-return]
        return RunResult(state=WorkerState.HEALTHY)

    def _look(self) -> dict[int, int | None]:
        """Return the exit codes of the ranks, and record the memory of those still running."""
        codes = {rank: process.poll() for rank, (process, _) in self.ranks.items()}
        for rank, (running, _) in self.ranks.items():
            if codes[rank] is None:
                self.seen.setdefault(rank, Seen()).look_at(running.pid)
        if codes.get(0) == 0 and self.done_at is None:
            self.done_at = time.monotonic()
        return codes

    def _is_failing(self, codes: dict[int, int | None]) -> bool:
        """Return True if a rank has failed, and let the other machines know."""
        late = self.done_at is not None and time.monotonic() - self.done_at > self.config.parallel.timeout_s
        if self.failed_at is None and (late or any(codes.values()) or self.store.check([FAILING])):
            self.store.set(FAILING, "")
            self.failed_at = time.monotonic()
        return self.failed_at is not None

    def _wait_for_the_others(self, codes: dict[int, int | None]) -> RunResult:
        for rank, code in codes.items():
            if code and rank not in self.endings:
                self.endings[rank] = self._ending(rank, code)
        causes, timeout = {each.cause for each in self.endings.values()}, self.config.parallel.timeout_s
        left = [rank for rank, code in codes.items() if code is None]
        if is_interrupt := causes == {"interrupted"}:
            for rank in left:  # ranks with something to save note it, and the others end
                self.send(rank, signal.SIGINT)
        if left and time.monotonic() - (self.failed_at or 0) < (timeout if is_interrupt else SECONDS_TO_END):
            return RunResult(state=WorkerState.HEALTHY)
        for rank in left:
            silent = f"did not answer for {timeout} s (parallel.timeout_s), and was ended"
            self.endings[rank] = Ending(rank, "error", silent, "silent")
            self.send(rank, signal.SIGKILL)
        return RunResult(state=WorkerState.FAILED)

    def _ending(self, rank: int, code: int) -> Ending:
        _, file = self.ranks[rank]
        if file.is_file():
            return Ending(**json.loads(file.read_text(encoding="utf-8")))
        seen = self.seen.get(rank, Seen())
        together = sum(each.resident_bytes for each in self.seen.values())
        seen = Seen(together, seen.data_bytes, was_oom_kill=oom_kills() > self.kills_before)
        status, error = ending_of_killed(code, seen, self.config.measure.memory_limit_mib, self.log_file)
        log = self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""
        gave_up = code == -signal.SIGABRT and NCCL_GAVE_UP in log
        return Ending(rank, status, error, "others" if gave_up else "own")


def run_ranks(config: TrainConfig, folder: Path, arguments: list[str], meeting: Meeting) -> list[Ending]:
    """Start the ranks of this machine, watch them to the end, and return the endings of those that failed."""
    n_here = config.parallel.per_machine
    module = ("-m", "llama_ft.launch.child", meeting.run_dir, *arguments)
    spec = WorkerSpec("rank", n_here, meeting, entrypoint=sys.executable, args=module, max_restarts=0)
    spec.monitor_interval = LOOK_SECONDS
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = END_NOW.name  # we handle interrupts: a rank may first save
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"  # machines have equally many ranks: the agents need not wait
    with tempfile.TemporaryDirectory(prefix="llama_ft_") as logs:
        agent = Agent(spec, DefaultLogsSpecs(logs), meeting.store, config, folder / LOG_FILE)
        for number in ALL_SIGNALS:
            signal.signal(number, agent.interrupt)
        first = meeting.rank * n_here
        try:
            agent.run()
        except SignalException:
            return [Ending(first, "interrupted", "interrupted, and did not stop by itself", "interrupted")]
        except DistError:  # from the store, which is the first machine's
            if meeting.rank == 0:
                raise
            return [*agent.endings.values(), meeting.without_first()]
        finally:
            for number in ALL_SIGNALS:  # our parent repeats them; the result must be written
                signal.signal(number, signal.SIG_IGN)
        return list(agent.endings.values())


def main() -> int:
    """Meet the other machines, run the ranks, and make sure that a result is written."""
    folder, command, listener, *rest = sys.argv[1:]
    config = read_config(Path(folder) / CONFIG_FILE)
    for number in ALL_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    stop_with_parent(seconds_to_stop(config), os.dup(sys.stdin.fileno()), partial(os.kill, os.getpid(), END_NOW))
    reading, _ = os.pipe()  # the ranks' standard input, which ends with this process, the holder of the other end
    os.dup2(reading, sys.stdin.fileno())
    os.close(reading)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)
    meeting, root, held = None, None, list[Any]()
    try:
        check_gpus(config)
        held += take_cards(config.gpu, config.parallel.per_machine, partial(print, flush=True))  # until the end
        meeting = meet(config, folder, int(listener) if listener != "none" else None)
        endings = run_ranks(config, Path(folder), [folder, command, *rest], meeting)
        root = meeting.settle(endings, SECONDS_TO_END)
    except BaseException as error:
        status, text = failure(error, "starting the processes")
        root = Ending(0, status, text, "input")
    written = read_result(Path(folder))
    if root is not None or written is None:
        result = written or new_result(config, command)
        result.status, result.error = (root.status, root.sentence) if root else ("ok", None)
        write_result(Path(folder), result)
    if meeting is not None:
        meeting.close(root, SECONDS_TO_END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
