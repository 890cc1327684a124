"""The device a run uses: choosing it, naming it, its clock, its memory and the limit on it."""

import os
import platform
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from llama_ft import __version__
from llama_ft.config import DeviceChoice, Dtype, GpuConfig, UserError
from llama_ft.system import MIB, NEAR_LIMIT, OUT_OF_MEMORY_TEXT, data_bytes, resident_bytes


def choose_device(gpu: GpuConfig) -> torch.device:
    """The device to run on.

    Raises:
        UserError: if a GPU is asked for and PyTorch sees none, or it is smaller than the profile's card.
    """
    if gpu.device is DeviceChoice.cuda and not torch.cuda.is_available():
        raise UserError(f"gpu={gpu.name} needs a CUDA GPU, and PyTorch sees none here: use gpu=cpu or gpu=auto")
    if gpu.device is DeviceChoice.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory / MIB
    if gpu.usable_mib is not None and gpu.usable_mib > total:
        raise UserError(
            f"gpu={gpu.name} has {gpu.usable_mib:,} MiB to use, more than the {total:,.0f} MiB of this"
            f" {device_name(device)}: use gpu=auto"
        )
    return device


def has_bf16(device: torch.device, gpu: GpuConfig) -> bool:
    """Whether the card, the profile's or else the real one, computes in bf16 itself, not by emulation."""
    return device.type == "cpu" or (gpu.capability or torch.cuda.get_device_capability(device)) >= (8, 0)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(choice: Dtype, device: torch.device, gpu: GpuConfig) -> torch.dtype:
    """The dtype of a model that is not trained: the one chosen; `auto` is fp32 on the CPU, else the card's 16 bit."""
    short = "bf16" if has_bf16(device, gpu) else "fp16"
    auto = "fp32" if device.type == "cpu" else short
    return DTYPES[auto if choice is Dtype.auto else choice.name]


def device_of_profile(gpu: GpuConfig, limit_mib: int | None = None) -> torch.device:
    """The device of `choose_device`, with the profile's memory and kernels: a bigger card behaves as the profile's.

    `limit_mib` is a limit in place of the profile's.
    """
    device, limit_mib = choose_device(gpu), limit_mib or gpu.usable_mib
    if limit_mib is not None:
        limit_memory(device, limit_mib)
    if gpu.capability is not None and gpu.capability < (8, 0):  # kernels that it lacks need less memory than its own
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def device_name(device: torch.device) -> str:
    """Name for people: the GPU's, or the processor's with the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    name = match[1] if match else platform.processor() or platform.machine()
    n_threads = torch.get_num_threads()
    return f"{name}, {n_threads} thread{'s' if n_threads > 1 else ''}"


class Stopwatch:
    """Sums the seconds of its parts, with the device idle at both ends of each."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._start = device, 0.0
        self.seconds = 0.0

    def start(self) -> None:
        """Begin a part."""
        self._start = self._now()

    def stop(self) -> None:
        """End the part."""
        self.seconds += self._now() - self._start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def memory_in_use_mib(device: torch.device) -> float:
    """Memory in use now: the allocator's on CUDA, the process's resident set on the CPU. Does not wait."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    return resident_bytes(os.getpid()) / MIB or peak_rss_mib()


def peak_rss_mib() -> float:
    """The process's largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if platform.system() == "Darwin" else peak / 1024  # bytes there, KiB on Linux


def limit_memory(device: torch.device, limit_mib: int) -> None:
    """Make allocations fail beyond a limit: of the allocator on CUDA, of the process's data segment on the CPU.

    Raises:
        UserError: if the operating system has no such limit.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_mib * MIB / total), device)
        return
    torch.ones(256, 256) @ torch.ones(256, 256)  # starts the threads: their failing to start cannot be caught
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_mib * MIB, resource.RLIM_INFINITY))
    except (ValueError, OSError) as error:
        raise UserError(f"measure.memory_limit_mib={limit_mib} cannot be set on this system: {error}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out. PyTorch on the CPU raises a plain RuntimeError for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError | OSError | ImportError):
        return False
    # oneDNN says no more than this, for other reasons too.
    unclear = re.search("could not (create|execute) a primitive", str(error)) is not None
    return bool(OUT_OF_MEMORY_TEXT.search(str(error))) or (unclear and is_near_data_limit())


@contextmanager
def out_of_memory_explained(advice: str) -> Iterator[None]:
    """Raise a UserError that says what needs less, where memory runs out inside."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {advice}") from error


def is_near_data_limit() -> bool:
    """Whether the process's data segment fills nine tenths of the limit on it; false where there is none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return limit != resource.RLIM_INFINITY and data_bytes(os.getpid()) > NEAR_LIMIT * limit


def versions() -> dict[str, str | None]:
    """The software that measured numbers depend on."""
    return {
        "llama_ft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sentencepiece": version("sentencepiece"),
    }
