"""How the processes of a run ended, and, where they are several, which of them is the reason."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Literal

from llama_ft.records.result import Status
from llama_ft.system import MIB, NEAR_LIMIT, OUT_OF_MEMORY_TEXT, data_bytes, resident_bytes, total_memory_bytes

# Why a rank ended, the reason of a run's end before its consequences: a fault of its own or in what the user gave; an
# interrupt; it was waited for in vain; another rank was lost to it.
Cause = Literal["own", "input", "interrupted", "silent", "others"]
CAUSES: tuple[Cause, ...] = ("own", "input", "interrupted", "silent", "others")


@dataclass(frozen=True)
class Ending:
    """How a rank ended that did not end well."""

    rank: int
    status: Status
    error: str
    cause: Cause
    time_s: float = field(default_factory=time.time)

    @property
    def sentence(self) -> str:
        """The error, which names the rank unless it is the same for all of them."""
        is_all_the_same = self.cause == "interrupted" or (self.cause == "input" and self.rank == 0)
        return self.error if is_all_the_same else f"rank {self.rank}: {self.error}"


def root_of(endings: Collection[Ending]) -> Ending | None:
    """The one that is the reason of the others; None where there are none."""

    def precedence(each: Ending) -> tuple[int, float, int]:
        return CAUSES.index(each.cause), each.time_s if each.cause in ("own", "others") else 0, each.rank

    return min(endings, key=precedence, default=None)


@dataclass
class Seen:
    """What is seen of a process from outside."""

    resident_bytes: int = 0  # when it was last looked at
    data_bytes: int = 0  # of the data segment, which RLIMIT_DATA limits
    was_oom_kill: bool = False  # whether the system has killed a process of our control group for memory meanwhile
    interrupt: KeyboardInterrupt | None = None

    def look_at(self, pid: int) -> None:
        """Note its memory."""
        self.resident_bytes = resident_bytes(pid) or self.resident_bytes
        self.data_bytes = data_bytes(pid) or self.data_bytes


def ending_of_killed(code: int, seen: Seen, limit_mib: int | None, log_file: Path) -> tuple[Status, str]:
    """Status and error text of a child that was killed, for memory where there is evidence, or crashed."""
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
