"""The device a run uses: choosing it, naming it, its kernels, its memory and the limit on it."""

import os
import platform
import re
import resource
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

import torch

from llama_ft import __version__
from llama_ft.config import DeviceChoice, Dtype, GpuConfig, UserError
from llama_ft.kernels import use_kernels_of
from llama_ft.system import MIB, NEAR_LIMIT, OUT_OF_MEMORY_TEXT, cpu_info, data_bytes, may_have_gpu, resident_bytes


def choose_device(gpu: GpuConfig) -> torch.device:
    """Choose the device; a UserError if PyTorch cannot use the requested GPU, or the GPU has less than its profile."""
    if gpu.device is DeviceChoice.cpu:
        return torch.device("cpu")
    if reason := why_no_gpu():
        if gpu.device is DeviceChoice.cuda or gpu.index is not None:
            raise UserError(f"gpu={gpu.name} needs a CUDA GPU, and {reason}: use gpu=cpu, or see docs/gpus.md")
        return torch.device("cpu")
    device = torch.device("cuda", gpu_index(gpu))
    check_card(device, gpu)
    return device


def gpu_index(gpu: GpuConfig) -> int:
    """Index of the GPU among those that PyTorch sees; a UserError if there are fewer."""
    index, n_gpus = gpu.index or 0, torch.cuda.device_count()
    if index >= n_gpus:
        raise UserError(f"gpu.index={index}: PyTorch sees {n_gpus} here; the last is gpu.index={n_gpus - 1}")
    return index


def check_card(device: torch.device, gpu: GpuConfig) -> None:
    """Raise a UserError if PyTorch has no kernels for a card, or the card has less than the profile."""
    card = torch.cuda.get_device_properties(device)
    capability, total_mib = (card.major, card.minor), card.total_memory / MIB
    built_for = torch.cuda.get_arch_list()
    if not has_kernels(capability, built_for):
        what = f"its compute capability is {card.major}.{card.minor}, and kernels exist for {', '.join(built_for)}"
        advice = "docs/gpus.md names a build that has them"
        raise UserError(f"PyTorch {torch.__version__} has no kernels for this {card.name}: {what}; {advice}")
    if gpu.capability is not None and gpu.capability > capability:
        older = f"this {card.name} has the older {card.major}.{card.minor}, which lacks some of its kernels"
        raise UserError(f"gpu={gpu.name} has compute capability {gpu.compute_capability}, and {older}: use gpu=auto")
    if gpu.usable_mib is not None and gpu.usable_mib > total_mib:
        here = f"the {total_mib:,.0f} MiB of this {card.name}"
        raise UserError(f"gpu={gpu.name} has {gpu.usable_mib:,} MiB to use, more than {here}: use gpu=auto")


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return True if a build for architectures such as `sm_80` or `compute_90` runs on a card.

    Binaries run from their own version up to the next major one; PTX, `compute_*`, is compiled for any later card;
    with a letter, as in `sm_90a`, either is for that version only (CUDA C++ Programming Guide, compute capability). A
    build that names none, such as AMD's with `gfx942`, is accepted.
    """
    for kind, digits, letter in (named := re.findall(r"\b(sm|compute)_(\d+)([a-z]?)", " ".join(architectures))):
        built = int(digits[:-1]), int(digits[-1])
        is_older = not letter and built < capability
        if built == capability or (is_older and (kind == "compute" or built[0] == capability[0])):
            return True
    return not named


def why_no_gpu() -> str | None:
    """The reason why PyTorch sees no CUDA GPU; None if it sees one. Call this before CUDA numbers its GPUs."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's numbers; CUDA's own put the fastest first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an old driver: the reason names it
        if torch.cuda.is_available():
            return None
    if platform.system() == "Darwin":
        return "Apple's GPUs are not used"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return next(iter(str(error).strip().splitlines()), "").split(". ")[0].rstrip(".")  # the rest is advice
    return "PyTorch sees none"


def about_device(device: torch.device, gpu: GpuConfig) -> str:
    """The device and the reason for it; a second line warns if the machine has a GPU that is not used."""
    why, warning, n_gpus = f"gpu={gpu.name}", "", 0
    if device.type == "cuda" and (n_gpus := torch.cuda.device_count()) > 1:
        why += f"; gpu.index={device.index} of {n_gpus}"
    elif gpu.device is DeviceChoice.auto and device.type == "cpu":
        reason = why_no_gpu()
        why += f"; {reason}"
        if may_have_gpu():
            warning = f"\nWARNING: this machine has an NVIDIA GPU, and it is not used: {reason}; see docs/gpus.md"
    return f"device: {device_name(device)} ({why}){warning}"


def has_bf16(device: torch.device, gpu: GpuConfig) -> bool:
    """Return True if the card (the profile's, else the real one) computes in bf16 natively, not by emulation."""
    return device.type == "cpu" or (gpu.capability or torch.cuda.get_device_capability(device)) >= (8, 0)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(choice: Dtype, device: torch.device, gpu: GpuConfig) -> torch.dtype:
    """The dtype of a model for inference; `auto` is fp32 on the CPU, else the card's 16-bit format."""
    short = "bf16" if has_bf16(device, gpu) else "fp16"
    auto = "fp32" if device.type == "cpu" else short
    return DTYPES[auto if choice is Dtype.auto else choice.name]


def use_device(device: torch.device, gpu: GpuConfig, limit_mib: int | None = None) -> torch.device:
    """Set up the device's kernels and its memory limit (`limit_mib`, else the profile's); creates a CUDA context."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if (limit_mib := limit_mib or gpu.usable_mib) is not None:
        limit_memory(device, limit_mib)
    use_kernels_of(device, gpu.capability)
    return device


def device_name(device: torch.device) -> str:
    """Name for display: the GPU's, or the processor's with the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = cpu_info("model name") or platform.processor() or platform.machine()
    n_threads = torch.get_num_threads()
    return f"{name}, {n_threads} thread{'s' if n_threads > 1 else ''}"


def memory_in_use_mib(device: torch.device) -> float:
    """Memory in use now: the allocator's on CUDA, the process's resident set on the CPU. Does not synchronize."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    return resident_bytes(os.getpid()) / MIB or peak_rss_mib()


def peak_rss_mib() -> float:
    """The process's largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if platform.system() == "Darwin" else peak / 1024  # bytes there, KiB on Linux


def limit_memory(device: torch.device, limit_mib: int) -> None:
    """Limit the CUDA allocator, or the process's data segment on the CPU; a UserError if the system cannot."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_mib * MIB / total), device)
        return
    torch.ones(256, 256) @ torch.ones(256, 256)  # starts the threads: a failure to do so later cannot be caught
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_mib * MIB, resource.RLIM_INFINITY))
    except (ValueError, OSError) as error:
        raise UserError(f"measure.memory_limit_mib={limit_mib} cannot be set on this system: {error}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that memory ran out. PyTorch on the CPU raises a plain RuntimeError for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError | OSError | ImportError):
        return False
    text = str(error)
    if "could not create a primitive" in text or "could not execute a primitive" in text:  # oneDNN gives no reason
        return is_near_data_limit()
    if "CUBLAS_STATUS_NOT_INITIALIZED" in text:  # its handle needs memory
        return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 512 * MIB
    return OUT_OF_MEMORY_TEXT.search(text) is not None


@contextmanager
def out_of_memory_explained(advice: str) -> Iterator[None]:
    """Turn running out of memory in this block into a UserError with the advice."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {advice}") from error


def is_near_data_limit() -> bool:
    """Return True if the process's data segment fills nine tenths of its limit; False without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return limit != resource.RLIM_INFINITY and data_bytes(os.getpid()) > NEAR_LIMIT * limit


def versions() -> dict[str, str | None]:
    """Versions of the software that measurements depend on."""
    return {
        "llama_ft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sentencepiece": version("sentencepiece"),
    }
