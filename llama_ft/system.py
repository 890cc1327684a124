"""What the operating system reports about processes and memory. Knows nothing of torch."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

MIB = 2**20
Log = Callable[[str], None]  # is given messages, line by line
Advance = Callable[[int], None]  # is called with each increment towards a total
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # shows a title and the progress towards a total

# Messages of PyTorch on the CPU, of CUDA, its driver and libraries, of uncaught C++ exceptions, and of the loader of
# shared libraries. The NVML assertion replaces CUDA's own error where NVML does not know the card: on a slice of one
# (MIG), on Jetson, in some containers (pytorch/pytorch#112377).
OUT_OF_MEMORY_TEXT = re.compile(
    r"can't allocate memory|not enough memory|CUDA out of memory|MemoryError|bad_alloc|[Cc]annot allocate memory"
    r"|failed to map segment|CUDA (driver )?error: out of memory|CU(BLAS|DNN)_STATUS_\w*ALLOC"
    r"|NVML_SUCCESS == r INTERNAL ASSERT"
)
NEAR_LIMIT = 0.9  # a killed process counts as out of memory if it held this share of all memory


def silent(line: str) -> None:
    """A `Log` that discards messages."""


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Advance]:
    """A `Progress` that shows nothing."""
    yield lambda more: None


def first_cause(error: BaseException) -> str:
    """The message of an exception's first cause: "Connection refused" rather than what followed from it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def is_wsl() -> bool:
    """Return True for Linux under Windows (WSL 2), where CUDA uses Windows' driver."""
    return Path("/dev/dxg").exists()


def may_have_gpu() -> bool:
    """Return True if an NVIDIA driver is there, or under WSL may be, even if PyTorch cannot use it."""
    return is_wsl() or Path("/proc/driver/nvidia/version").exists()


class Pace:
    """Decides when a long operation reports its progress: every few seconds."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return True if a report is due, and start the wait for the next one."""
        if (now := time.monotonic()) - self._last < self.SECONDS:
            return False
        self._last = now
        return True


def resident_bytes(pid: int) -> int:
    """Resident set of a process; 0 if unknown."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def data_bytes(pid: int) -> int:
    """Data segment of a process, which RLIMIT_DATA limits; 0 if unknown."""
    with suppress(OSError):
        if match := re.search(r"^VmData:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return int(match[1]) * 1024
    return 0


def cpu_info(key: str) -> str:
    """A value that Linux reports about the CPU, such as `model name`; empty elsewhere."""
    with suppress(OSError):
        if match := re.search(rf"^{key}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return ""


def _cgroup_file(name: str) -> Path:
    line = ""
    with suppress(OSError, StopIteration):
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/") / name


def n_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def oom_kills() -> int:
    """Number of processes of our control group killed for memory so far; 0 if unknown."""
    try:
        fields = _cgroup_file("memory.events").read_text().split()
        return int(fields[fields.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return 0


def total_memory_bytes() -> float:
    """Most bytes that this process could use: the machine's or the control group's; infinite if unknown."""
    sizes = [float("inf")]
    with suppress(OSError, ValueError):
        sizes.append(float(_cgroup_file("memory.max").read_text()))  # may be the word max
    with suppress(OSError, ValueError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes)
