"""Parts that use the device directly: its facts, attention, the buffers of losses, the tracker, decoding."""

import gc
import time
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.gpu.check import Numbers, Outcome, Setting, synchronize
from experiments.study import Claim
from llama_ft.config import DataConfig, GpuConfig, ModelConfig, OptimConfig, TrainConfig
from llama_ft.config.presets import preset
from llama_ft.data.records import Sample
from llama_ft.decoding.state import GenerationState
from llama_ft.device import about_device, device_name, has_bf16, versions
from llama_ft.measure.card import Card, attention_kernel
from llama_ft.measure.worst_case import hardest_windows, track_memory
from llama_ft.model.attention import repeats_keys
from llama_ft.model.weights import load_model
from llama_ft.planning.fit import LIBRARIES_MIB
from llama_ft.planning.gpu_traits import profile_here, workspace_bytes
from llama_ft.records.metrics import StepMetrics
from llama_ft.system import MIB
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.loop import StepOutput, Windows
from llama_ft.training.metrics import StepMeter
from llama_ft.training.setup import set_up

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = GpuConfig("auto")


def facts(setting: Setting) -> Outcome:
    """Versions, the card's facts, and the memory that libraries use outside the allocator."""
    device = setting.device
    numbers: Numbers = {"device": device_name(device), "why": about_device(device, AUTO), "versions": versions()}
    if device.type == "cpu":
        return numbers, []
    card = Card(device)
    torch.cuda.reset_peak_memory_stats(device)
    x = torch.ones(256, 256, device=device, requires_grad=True)
    (x @ x).sum().backward()  # a workspace in this thread and one in the backward pass's
    workspaces_mib = torch.cuda.max_memory_allocated(device) / MIB
    card.note_kernels(preset("model", "llama2_7b", ModelConfig), torch.float16)
    q = torch.ones(1, 8, 64, 64, device=device, dtype=torch.float16)
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
    synchronize(device)
    card.note_end(None)
    planned_mib, growth_mib = workspace_bytes(profile_here(AUTO)) / MIB, card.facts.context_growth_mib or 0.0
    numbers |= {"card": vars(card.facts), "built_for": torch.cuda.get_arch_list()}
    return numbers, [
        Claim(
            "cuBLAS's workspaces are as large as planned, to 2 MiB",
            abs(workspaces_mib - planned_mib) <= 2,
            {"MiB": workspaces_mib, "planned": planned_mib},
        ),
        Claim(
            "libraries take no more, after the first check, than is set aside for them",
            growth_mib <= LIBRARIES_MIB,
            {"MiB": growth_mib},
        ),
    ]


def attention(setting: Setting) -> Outcome:
    """The attention kernel that runs, and its cost for a new length."""
    device, numbers, claims = setting.device, {}, []
    wanted = {"fp32": "efficient", "bf16": "flash", "fp16": "flash"} if device.type == "cuda" else {"fp32": "flash"}
    for name, kernel in wanted.items():
        if name == "bf16" and not has_bf16(device, AUTO):
            continue
        for model in ("llama2_7b", "llama3_2_1b"):
            config = preset("model", model, ModelConfig)
            chosen = attention_kernel(config, DTYPES[name], device)
            if not torch.backends.cuda.flash_sdp_enabled():
                kernel = "efficient"  # before compute capability 8.0
            times = _new_and_old(config, DTYPES[name], device)
            numbers[f"{name}, {model}"] = {"kernel": chosen, "ms": times}
            new, old = median(times["new"]), median(times["old"])
            claims.append(Claim(f"{name}, {model}: attention is {kernel}", chosen == kernel, {}))
            holds = new <= 3 * old + 1
            claims.append(Claim(f"{name}, {model}: a new length costs no more", holds, {"ms": new, "old, ms": old}))
    if device.type == "cuda" and has_bf16(device, AUTO):  # for comparison: cuDNN's attention, which is off
        torch.backends.cuda.enable_cudnn_sdp(True)
        numbers["with cuDNN"] = _new_and_old(preset("model", "llama2_7b", ModelConfig), torch.bfloat16, device)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return numbers, claims


def _new_and_old(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of attention forward and backward at 20 lengths, for the first and the second time."""
    times: dict[str, list[float]] = {"new": [], "old": []}
    for which in times:
        for length in range(99, 120):
            q = torch.randn(1, config.n_heads, length, config.head_dim, device=device, dtype=dtype, requires_grad=True)
            n_kv_heads = config.n_heads if repeats_keys(q, None) else config.n_kv_heads
            kv = torch.randn(1, n_kv_heads, length, config.head_dim, device=device, dtype=dtype, requires_grad=True)
            synchronize(device)
            began = time.perf_counter()
            grouped = n_kv_heads != config.n_heads
            F.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=grouped).sum().backward()
            synchronize(device)
            times[which].append(1000 * (time.perf_counter() - began))
        times[which] = times[which][1:]  # the first loads the kernel
    return times


class LateMeter(StepMeter):
    """Reads a step after the device has finished all submitted work, including the next step's copy."""

    def flush(self) -> StepMetrics | None:
        """Return the newest step, if it has not been read yet."""
        synchronize(self._device)
        return super().flush()


def losses(setting: Setting) -> Outcome:
    """Check that each line of metrics has its own step's loss, even if the host runs ahead and between checkpoints."""
    device = setting.device
    meter, lines = LateMeter(8, device), []
    for step in range(1, 9):
        output = StepOutput(torch.tensor(float(step), device=device), torch.ones((), device=device), 0.1, 1)
        lines.append(meter.record(output))
        if step == 3:
            lines.append(meter.flush())
            meter.restart_clock()
    read = [line.loss for line in [*lines, meter.flush()] if line is not None]
    return {"losses": read}, [Claim("eight steps have eight losses, in order", read == list(range(1, 9)), {})]


def tracker(setting: Setting) -> Outcome:
    """Check that the tracker, which holds tensors a little longer, does not raise the reported peak."""
    device, numbers, claims = setting.device, {}, []
    name = "tiny" if setting.dry else "llama2_7b_1layer"
    for combination in ("baseline", "mp", "lora", "mp_lora"):
        optim = OptimConfig(**{part: True for part in combination.split("_") if part != "baseline"})
        config = TrainConfig(
            preset("model", name, ModelConfig),
            data=DataConfig("sample"),
            checkpoint="random",
            tokenizer="none",  # not read
            optim=optim,
        )
        step = set_up(config, Precision.of(config, device.type, has_bf16(device, AUTO)), device)
        data = Windows.over([Sample.after([1] * n, 2) for n in (200, 120, 60)], step, config.training)
        hardest = hardest_windows(data)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of the combination before it
        peaks = {"counted, MiB": track_memory(step, hardest).peak_mib}
        if device.type == "cuda":
            peaks["tracked, MiB"] = torch.cuda.max_memory_allocated(device) / MIB
            torch.cuda.reset_peak_memory_stats(device)
            for window in hardest:
                step.dry_run(window)
            peaks["untracked, MiB"] = untracked = torch.cuda.max_memory_allocated(device) / MIB
            holds = abs(peaks["tracked, MiB"] / untracked - 1) <= 0.01 and peaks["counted, MiB"] <= untracked
            claims.append(Claim(f"{combination}: tracked and untracked peak agree to 1 %", holds, peaks))
            del step
            gc.collect()
            torch.cuda.empty_cache()
        numbers[combination] = peaks
    return numbers, claims


def decoding(setting: Setting) -> Outcome:
    """The seconds of each token with the KV cache, for new and then for known numbers of keys, and without it."""
    device = setting.device
    name = "tiny" if setting.dry else "llama3_2_1b"
    dtype = torch.float32 if setting.dry else DTYPES["bf16" if has_bf16(device, AUTO) else "fp16"]
    model = load_model(preset("model", name, ModelConfig), "random", device, dtype).eval()
    texts, seconds = [], []
    for kv_cache in (True, True, False):
        with torch.inference_mode():
            state = GenerationState(model, [list(range(5, 37))], 64, kv_cache)
            for _ in range(64):
                began = time.perf_counter()
                state.append(state.next_logits().argmax(-1))
                synchronize(device)
                seconds.append(time.perf_counter() - began)
        texts.append(state.tokens[0, 32:].tolist())
    new, old = (1000 * median(seconds[start + 8 : start + 64]) for start in (0, 64))
    same = sum(a == b for a, b in zip(*texts[1:], strict=True))
    return {"model": name, "seconds": seconds, "same tokens": same}, [
        Claim("a new number of keys costs a token no more", new <= 3 * old, {"ms": new, "old, ms": old})
    ]
