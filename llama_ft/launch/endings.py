"""The endings of a run's processes, and, if there are several, which of them caused the others."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Literal

from llama_ft.records.result import Status
from llama_ft.system import MIB, NEAR_LIMIT, OUT_OF_MEMORY_TEXT, data_bytes, resident_bytes, total_memory_bytes

# Why a rank ended, causes of a run's end before consequences: its own failure; the user's input; an interrupt; it did
# not answer; it lost another rank.
Cause = Literal["own", "input", "interrupted", "silent", "others"]
CAUSES: tuple[Cause, ...] = ("own", "input", "interrupted", "silent", "others")


@dataclass(frozen=True)
class Ending:
    """The ending of a rank that did not end well."""

    rank: int
    status: Status
    error: str
    cause: Cause
    time_s: float = field(default_factory=time.time)

    @property
    def sentence(self) -> str:
        """The error, with the rank unless all ranks have the same one."""
        is_all_the_same = self.cause == "interrupted" or (self.cause == "input" and self.rank == 0)
        return self.error if is_all_the_same else f"rank {self.rank}: {self.error}"


def root_of(endings: Collection[Ending]) -> Ending | None:
    """The ending that caused the others; None if there are none."""

    def precedence(each: Ending) -> tuple[int, float, int]:
        return CAUSES.index(each.cause), each.time_s if each.cause in ("own", "others") else 0, each.rank

    return min(endings, key=precedence, default=None)


@dataclass
class Seen:
    """A process as seen from outside."""

    resident_bytes: int = 0  # when it was last looked at
    data_bytes: int = 0  # of the data segment, which RLIMIT_DATA limits
    was_oom_kill: bool = False  # the system has meanwhile killed a process of our control group for memory
    interrupt: KeyboardInterrupt | None = None

    def look_at(self, pid: int) -> None:
        """Record its memory."""
        self.resident_bytes = resident_bytes(pid) or self.resident_bytes
        self.data_bytes = data_bytes(pid) or self.data_bytes


def ending_of_killed(code: int, seen: Seen, limit_mib: int | None, log_file: Path) -> tuple[Status, str]:
    """Status and error text of a child that was killed or crashed; `oom` if there is evidence of that."""
    log = log_file.read_text(encoding="utf-8", errors="replace") if log_file.exists() else ""
    how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
    held_most = seen.resident_bytes > NEAR_LIMIT * total_memory_bytes()
    # Code that does not check its allocations crashes where they fail.
    crashed_at_limit = code < 0 and limit_mib is not None and seen.data_bytes > NEAR_LIMIT * limit_mib * MIB
    if seen.interrupt:
        return "interrupted", "interrupted, and did not stop by itself in time"
    if code == -SIGKILL and (seen.was_oom_kill or held_most):
        return "oom", "killed by the operating system, which was out of memory"
    if crashed_at_limit or OUT_OF_MEMORY_TEXT.search(log):
        return "oom", f"out of memory: the process ended {how}"
    if code in (-SIGKILL, -SIGTERM):
        return "killed", f"killed {how}; no sign that memory was the reason"
    return "error", f"the run's process ended {how}; see {log_file}"
