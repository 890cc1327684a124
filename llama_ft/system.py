"""What the operating system says of processes and of memory. Knows nothing of torch."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

MIB = 2**20
Log = Callable[[str], None]  # is told, in lines, how far something is
# Shows a title, and how much of a total is done: what it gives is called with how much more is.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

# Said by PyTorch on the CPU, by CUDA, its driver and its libraries, by C++ code that nothing catches, and by the loader
# of shared libraries. NVML's failing is what CUDA's running out becomes where NVML does not know the card: on a slice
# of it (MIG), on Jetson, in some containers (pytorch/pytorch#112377).
OUT_OF_MEMORY_TEXT = re.compile(
    r"can't allocate memory|not enough memory|CUDA out of memory|MemoryError|bad_alloc|[Cc]annot allocate memory"
    r"|failed to map segment|CUDA (driver )?error: out of memory|CU(BLAS|DNN)_STATUS_\w*ALLOC"
    r"|NVML_SUCCESS == r INTERNAL ASSERT"
)
NEAR_LIMIT = 0.9  # a killed process that held this share of the memory there is was killed for memory


def silent(line: str) -> None:
    """The `Log` that says nothing."""


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """The `Progress` that shows nothing."""
    yield lambda more: None


def first_cause(error: BaseException) -> str:
    """What the first cause of an exception says: "Connection refused" rather than all that happened because of it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def is_wsl() -> bool:
    """Whether this is Linux under Windows (WSL 2), where CUDA is Windows' driver's."""
    return Path("/dev/dxg").exists()


def may_have_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU's driver, or under Windows may have; whatever PyTorch can do with it."""
    return is_wsl() or Path("/proc/driver/nvidia/version").exists()


class Pace:
    """When something that takes long says how far it is: every few seconds."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time for a line; the next one then waits."""
        if (now := time.monotonic()) - self._last < self.SECONDS:
            return False
        self._last = now
        return True


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


def cpu_info(key: str) -> str:
    """What Linux says of the CPU, such as its `model name`; empty elsewhere."""
    with suppress(OSError):
        if match := re.search(rf"^{key}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return ""


def _cgroup_file(name: str) -> Path:
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return Path("/sys/fs/cgroup") / name
    return Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/") / name


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def oom_kills() -> int:
    """Processes of our control group that were killed for memory so far; 0 where the system does not tell."""
    try:
        fields = _cgroup_file("memory.events").read_text().split()
        return int(fields[fields.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return 0


def total_memory_bytes() -> float:
    """Bytes that this process could have at most: the machine's or the control group's; infinite where unknown."""
    sizes = [float("inf")]
    with suppress(OSError, ValueError):
        sizes.append(float(_cgroup_file("memory.max").read_text()))  # may be the word max
    with suppress(OSError, ValueError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes)
