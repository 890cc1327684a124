"""The device of a run: which one, why, with which kernels; a GPU's library calls are stood in for."""

import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.models import relative, small_model
from helpers.training import ragged_samples

from llama_ft import device as devices
from llama_ft.config import DeviceChoice, GpuConfig, ModelConfig, UserError
from llama_ft.config.presets import preset
from llama_ft.data.dataset import Dataset
from llama_ft.device import about_device, choose_device, has_kernels, is_out_of_memory, why_no_gpu
from llama_ft.kernels import use_kernels_of
from llama_ft.launch.child import failure
from llama_ft.launch.interrupts import Interrupts
from llama_ft.launch.process import child_environment
from llama_ft.launch.run import MeasuredRun
from llama_ft.measure import card
from llama_ft.measure.card import Card, Nvml, attention_kernel
from llama_ft.measure.stopwatch import Stopwatch
from llama_ft.measure.worst_case import measure_worst_case, warm_up
from llama_ft.model.attention import repeats_keys
from llama_ft.planning.gpu_traits import profile_here
from llama_ft.records.result import new_result
from llama_ft.system import MIB
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training import metrics
from llama_ft.training.loop import StepOutput, Windows
from llama_ft.training.metrics import Moment, StepMeter
from llama_ft.training.step import TrainStep

AUTO, CUDA = GpuConfig(name="auto"), torch.device("cuda", 0)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), n_gpus: int = 1, **calls: object):
    """A PyTorch that sees GPUs; `calls` replaces more of `torch.cuda`."""
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], total_memory=80_000 * MIB, name="NVIDIA H100", uuid="4711"
    )
    answers = {
        "is_available": True,
        "device_count": n_gpus,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "get_device_capability": capability,
        "get_arch_list": ["sm_75", "sm_80", "sm_90", "compute_90"],
        "set_device": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call)


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """PyTorch's global settings as they were."""
    backends, precision = torch.backends.cuda, torch.get_float32_matmul_precision()
    flash, cudnn = backends.flash_sdp_enabled(), backends.cudnn_sdp_enabled()
    yield
    backends.enable_flash_sdp(flash)
    backends.enable_cudnn_sdp(cudnn)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(("capability", "flash"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), True)])
def test_every_gpu_gets_the_kernels_that_the_planner_knows(monkeypatch, capability, flash: bool) -> None:
    torch.set_float32_matmul_precision("high")  # as in NVIDIA's containers
    pretend(monkeypatch, capability)
    use_kernels_of(CUDA)
    backends = torch.backends.cuda
    assert (backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled()) == (False, flash)
    assert torch.get_float32_matmul_precision() == "highest"
    use_kernels_of(CUDA, (7, 0))  # a profile's
    assert not backends.flash_sdp_enabled()


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading"
)


@pytest.mark.parametrize(
    ("built_for", "visible", "reason"),
    [
        ("13.0", None, "The NVIDIA driver on your system is too old (found version 12020)"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES hides it"),
        (None, None, f"PyTorch {torch.__version__} is built without CUDA"),
    ],
)
def test_a_gpu_that_is_not_used_is_said_with_the_reason(monkeypatch, built_for, visible, reason: str) -> None:
    def init() -> None:
        raise RuntimeError(OLD_DRIVER)

    pretend(monkeypatch, is_available=lambda: False, init=init)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(devices, "may_have_gpu", lambda: True)
    monkeypatch.setattr(devices.platform, "system", lambda: "Linux")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert why_no_gpu() == reason
    device = choose_device(AUTO)
    assert device.type == "cpu"
    line, warning = about_device(device, AUTO).splitlines()
    assert line.startswith("device: ")
    assert reason in line
    assert warning.startswith("WARNING: this machine has an NVIDIA GPU, and it is not used: ")
    assert "WARNING" not in about_device(device, replace(AUTO, name="cpu", device=DeviceChoice.cpu))
    monkeypatch.setattr(devices, "may_have_gpu", lambda: False)
    assert "WARNING" not in about_device(device, AUTO)
    for gpu in (preset("gpu", "a100_40gb", GpuConfig), replace(AUTO, index=0)):
        with pytest.raises(UserError, match="needs a CUDA GPU"):
            choose_device(gpu)


def test_the_gpu_is_chosen_by_its_index(monkeypatch) -> None:
    pretend(monkeypatch, n_gpus=2)
    assert choose_device(AUTO) == CUDA
    assert choose_device(replace(AUTO, index=1)) == torch.device("cuda", 1)
    assert about_device(torch.device("cuda", 1), AUTO) == "device: NVIDIA H100 (gpu=auto; gpu.index=1 of 2)"
    with pytest.raises(UserError, match=r"gpu.index=2: PyTorch sees 2 here; the last is gpu.index=1"):
        choose_device(replace(AUTO, index=2))


def test_a_profile_must_not_be_newer_or_larger_than_the_card(monkeypatch) -> None:
    pretend(monkeypatch, (7, 0), get_arch_list=lambda: ["sm_70"])
    with pytest.raises(UserError, match=r"gpu=rtx4090_24gb has compute capability 8\.9, and this.*older 7\.0"):
        choose_device(preset("gpu", "rtx4090_24gb", GpuConfig))
    pretend(monkeypatch)
    assert choose_device(preset("gpu", "a100_40gb", GpuConfig)) == CUDA
    with pytest.raises(UserError, match="more than the 80,000 MiB of this NVIDIA H100"):
        choose_device(preset("gpu", "h200_141gb", GpuConfig))


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((6, 0), ["sm_75"], False),
        ((8, 6), ["sm_75", "sm_80"], True),  # a later minor version runs an earlier one's code
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # compiled on the card
        ((12, 0), ["sm_90a", "compute_90a"], False),
        ((10, 0), ["sm_100a"], True),
        ((9, 4), ["gfx90a", "gfx942"], True),  # AMD's
        ((9, 0), [], True),
    ],
)
def test_a_build_without_the_cards_kernels_is_named(monkeypatch, capability, architectures, expected: bool) -> None:
    assert has_kernels(capability, architectures) is expected
    pretend(monkeypatch, capability, get_arch_list=lambda: architectures)
    if expected:
        assert choose_device(AUTO) == CUDA
    else:
        with pytest.raises(UserError, match=r"has no kernels for this NVIDIA H100: its compute capability is"):
            choose_device(AUTO)


def test_a_run_on_the_cpu_sees_no_gpu() -> None:
    assert child_environment(on_cpu=True)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be",
        "CUDA driver error: out of memory",
        "NVML_SUCCESS == r INTERNAL ASSERT FAILED at /pytorch/c10/cuda/CUDACachingAllocator.cpp:838",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_out_of_memory_by_all_its_names(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert failure(RuntimeError(text), "training")[0] == "oom"


@pytest.mark.parametrize("free_mib", [100, 40_000])
def test_a_library_that_does_not_start_is_out_of_memory_on_a_full_gpu(monkeypatch, free_mib: int) -> None:
    pretend(monkeypatch, mem_get_info=lambda: (free_mib * MIB, 80_000 * MIB))
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    assert is_out_of_memory(error) is (free_mib == 100)


def test_an_error_of_cuda_is_its_first_line_and_a_hint() -> None:
    more = "\nCUDA kernel errors might be asynchronously reported at some other API call"
    status, text = failure(RuntimeError(f"CUDA error: an illegal memory access was encountered{more}"), "training")
    assert status == "error"
    assert text.startswith(
        "RuntimeError during training: CUDA error: an illegal memory access was encountered; CUDA_LA"
    )
    assert "\n" not in text
    assert "expandable_segments:False" in failure(RuntimeError("CUDA driver error: unknown error"), "training")[1]


class Event(Moment):
    """The end of a step, at a time that a test says."""

    now = 0.0

    def __init__(self) -> None:
        self._time = Event.now


def test_lines_have_the_loss_and_the_time_of_their_own_step(monkeypatch) -> None:
    """Also after a checkpoint: a buffer is written again only when the step that it belongs to has been read."""
    monkeypatch.setattr(Event, "now", 0.0)
    meter = StepMeter(8, torch.device("cpu"))
    meter._moment, meter._pinned = Event, [torch.empty(2), torch.empty(2)]
    meter.restart_clock()
    lines, before = [], 0.0
    for step in range(1, 9):
        Event.now += step  # a step longer than the one before it
        lines.append(meter.record(StepOutput(torch.tensor(float(step)), torch.tensor(1.0), 0.1, 100 * step)))
        if step == 3:
            lines.append(meter.flush())
            Event.now += 50.0  # saving
            meter.restart_clock()
    lines = [line for line in [*lines, meter.flush()] if line is not None]
    assert [line.loss for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    for line in lines:
        assert line.time_s - before == pytest.approx(line.step)
        assert line.tokens_per_s == 100
        before = line.time_s


def test_a_step_is_waited_for_on_its_own_gpu(monkeypatch) -> None:
    """As of a model loaded with device="cuda:1", while the first GPU, which has nothing to do, is the current one."""
    streams: list[torch.device] = []
    second = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=streams.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=CUDA: device)
    monkeypatch.setattr(metrics.torch, "empty", lambda *_, **__: None)  # pinned
    StepMeter(8, second)
    assert streams == [second]


def test_the_allocators_peak_is_of_a_pass_that_is_not_tracked(monkeypatch) -> None:
    passes: list[tuple[int, bool]] = []

    def dry_run(step: TrainStep, window) -> None:
        is_tracked = torch.utils._python_dispatch._get_current_dispatch_mode() is not None
        passes.append((max(batch.tokens.shape[1] for batch in window), is_tracked))

    model = small_model(2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = TrainStep(model, optimizer, Precision("cpu"))
    step.device = CUDA
    calls: list[int] = []
    monkeypatch.setattr(TrainStep, "dry_run", dry_run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: calls.append(len(passes)))
    measure_worst_case(step, Windows(ragged_samples()))
    warm_up(step, Windows(ragged_samples()))
    n_tracked = sum(tracked for _, tracked in passes)
    assert calls == [n_tracked]  # once, when the last tracked one is over
    widths = [width for width, _ in passes[n_tracked:]]
    assert widths[0] == 39
    assert {39, 7} < set(widths)  # the widest, the narrowest, and one between


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "masked", "flash", "expected"),
    [
        (False, torch.float32, True, True, False),
        (True, torch.float32, False, True, True),
        (True, torch.bfloat16, False, True, False),
        (True, torch.bfloat16, True, True, True),
        (True, torch.float16, False, False, True),
    ],
)
def test_grouped_keys_are_repeated_where_no_kernel_takes_them(is_cuda, dtype, masked, flash, expected: bool) -> None:
    torch.backends.cuda.enable_flash_sdp(flash)
    q = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
    assert repeats_keys(q, torch.ones(1) if masked else None) is expected


def test_repeated_keys_change_no_result() -> None:
    model, tokens = small_model(2), torch.arange(24)[None] % 90
    assert model.config.n_kv_heads < model.config.n_heads
    with torch.no_grad():
        logits = model(tokens)
        for layer in model.layers:
            layer.attention.repeats_keys = lambda q, mask: True
        assert relative(model(tokens), logits) <= 1e-6


def test_what_a_run_says_of_its_gpu(monkeypatch) -> None:
    free = iter([79_000 * MIB, 70_000 * MIB])
    pretend(
        monkeypatch,
        mem_get_info=lambda _: (next(free), 80_000 * MIB),
        memory_reserved=lambda _: 0,
        memory_stats=lambda _: {"num_alloc_retries": 3, "num_ooms": 1},
    )
    answers = {"GetMemoryInfo": SimpleNamespace(used=600 * MIB), "GetTotalEnergyConsumption": 5000}
    answers |= {"GetMaxClockInfo": 1980, "GetClockInfo": 1755}
    monkeypatch.setattr(Nvml, "ask", lambda self, name, *_, **__: answers[name])
    monkeypatch.setattr(Nvml, "driver", lambda self: "580.65")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    use_kernels_of(CUDA)
    watched = Card(CUDA)
    monkeypatch.setattr(card, "attention_kernel", lambda *_: "flash")
    watched.note_kernels(preset("model", "tiny", ModelConfig), torch.float16)
    watched.note_end(350.0)
    facts = watched.facts
    assert (facts.index, facts.driver, facts.allocator) == (0, "580.65", "expandable_segments:True")
    assert (facts.others_mib, facts.context_mib, facts.context_growth_mib) == (600, 9400, 9000)
    assert (facts.n_alloc_retries, facts.n_ooms, facts.matmul_precision) == (3, 1, "highest")
    assert (facts.sm_clock_mhz, facts.max_sm_clock_mhz, facts.mean_power_w) == (1755, 1980, 350)
    assert facts.attention_kernel == "flash"
    assert watched.nvml.joules() == 5


def test_what_others_have_is_asked_before_the_run_has_anything(monkeypatch, tmp_path, tiny_config) -> None:
    """Whether it is PyTorch's limit, its choice among several GPUs or its free memory that makes our context."""
    calls: list[str] = []

    def makes_context(name: str, answer: object = None):
        return lambda *_: (calls.append(name), answer)[1]

    names = ("set_device", "set_per_process_memory_fraction")
    free = makes_context("mem_get_info", (70_000 * MIB, 80_000 * MIB))
    pretend(monkeypatch, n_gpus=2, mem_get_info=free, **{name: makes_context(name) for name in names})
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(Nvml, "used_mib", lambda self: calls.append("others") or 600.0)
    tiny_config.gpu = replace(preset("gpu", "a100_40gb", GpuConfig), index=1)
    result = new_result(tiny_config, "train")
    MeasuredRun(tiny_config, Dataset([], 0, 0, 0), tmp_path, result, lambda line: None, Interrupts())
    assert result.card.others_mib == 600
    assert calls[0] == "others"
    assert {*names, "mem_get_info"} == set(calls[1:])


def test_a_plan_for_the_gpu_that_is_here_is_for_the_one_with_the_index(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    pretend(monkeypatch, n_gpus=2, current_device=lambda: 0, mem_get_info=lambda i: (1000 * MIB, (i + 1) * 9000 * MIB))
    asked = [profile_here(each).memory_mib for each in (AUTO, replace(AUTO, index=1))]
    assert asked == [9000, 18000]
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    with pytest.raises(UserError, match=r"the last is gpu\.index=1"):
        profile_here(replace(AUTO, index=2))


def test_a_gpu_that_tells_nothing_leaves_gaps(monkeypatch) -> None:
    pretend(monkeypatch)
    nvml = Nvml(CUDA)  # no library, or no driver
    assert [nvml.joules(), nvml.used_mib(), nvml.driver(), nvml.sm_clock_mhz()] == [None] * 4


def test_power_is_energy_by_time_and_is_not_counted_while_the_watch_stands(monkeypatch) -> None:
    times, energies = iter([0.0, 2.0, 10.0, 13.0]), iter([100.0, 500.0, 9000.0, 9600.0])
    monkeypatch.setattr(Stopwatch, "_now", lambda self: next(times))
    watch = Stopwatch(torch.device("cpu"), lambda: next(energies))
    for _ in range(2):
        watch.start()
        watch.stop()
    assert watch.seconds == 5
    assert watch.mean_power_w == pytest.approx(1000 / 5)
    assert Stopwatch(torch.device("cpu")).mean_power_w is None


def test_the_attention_kernel_is_asked_of_pytorch(tiny_config) -> None:
    assert attention_kernel(tiny_config.model, torch.float32, torch.device("cpu")) == "flash"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_kernel(tiny_config.model, torch.float32, torch.device("cpu")) == "math"
