"""What only a GPU can show: the same results as on the CPU, the allocator's peaks, caps, no waiting within a step."""

import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import injected
from conftest import run as run_module
from helpers.models import SMALL, make_model, relative, small_model
from helpers.training import ragged_samples

from llama_ft.config import GpuConfig, MixedPrecisionConfig, ModelConfig, Optimizer, TrainingConfig
from llama_ft.config.presets import preset
from llama_ft.data.collate import collate, end_to_end
from llama_ft.data.records import Sample
from llama_ft.decoding.state import GenerationState
from llama_ft.device import use_device, why_no_gpu
from llama_ft.measure.card import attention_kernel
from llama_ft.measure.worst_case import track_memory
from llama_ft.model.attention import attend, has_varlen, takes_segments
from llama_ft.model.four_bit import FourBit
from llama_ft.model.stored import in_memory
from llama_ft.model.weights import build, load_model, materialize
from llama_ft.records.metrics import StepMetrics
from llama_ft.system import MIB
from llama_ft.techniques.gradient_checkpointing import checkpoint_layers
from llama_ft.techniques.lora import add_lora, lora_layers
from llama_ft.techniques.mixed_precision import Precision, mixed_precision
from llama_ft.training.loop import StepOutput
from llama_ft.training.metrics import StepMeter
from llama_ft.training.optimizers import MIN_PAGED, make_optimizer
from llama_ft.training.position import Position
from llama_ft.training.saver import Saver
from llama_ft.training.step import TrainStep

NO_GPU = why_no_gpu()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NO_GPU is not None, reason=f"{NO_GPU}; pytest tests/test_gpu.py shows a GPU"),
]
run = partial(run_module, timeout=300)  # a machine that has just been started reads gigabytes to import torch
# A folder of its own, for locks of GPUs too: tests that run side by side share the card.
GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "TMPDIR": tempfile.mkdtemp()}


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """Those of a run."""
    use_device(torch.device("cuda", 0), GpuConfig("auto"))


def step_on(device: str, precision: Precision) -> TrainStep:
    model = make_model(SMALL).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return TrainStep(model, optimizer, precision)


def sample_of(n_tokens: int) -> Sample:
    return Sample.after([5] * n_tokens, 3)


def test_losses_equal_those_on_the_cpu() -> None:
    window = [collate(ragged_samples())]
    losses = []
    for device in ("cpu", "cuda"):
        step = step_on(device, Precision(device))
        losses.append([step(window)[0].item() for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_logits_equal_those_on_the_cpu() -> None:
    model, tokens = small_model(2), torch.arange(40)[None]
    with torch.no_grad():
        assert relative(small_model(2).cuda()(tokens.cuda()).cpu(), model(tokens)) <= 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(precision: str) -> None:
    chosen = Precision("cuda")
    if precision != "fp32":
        chosen = mixed_precision(MixedPrecisionConfig(), "cuda", has_bf16=precision == "bf16")
    step, window = step_on("cuda", chosen), [collate([sample]).pinned() for sample in ragged_samples()]
    step(window)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(window)
    finally:
        torch.cuda.set_sync_debug_mode("default")


OPTIMIZERS = [Optimizer.adamw, Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_updates_never_wait_and_give_the_losses_of_the_cpu(optimizer: Optimizer, in_backward: bool) -> None:
    pytest.importorskip("bitsandbytes")
    window, losses = [collate(ragged_samples())], []
    for device in ("cpu", "cuda"):
        kind = optimizer if device == "cuda" or optimizer is Optimizer.adamw else Optimizer.adamw_8bit
        model = make_model(SMALL).to(device)
        made = make_optimizer(model.parameters(), TrainingConfig(lr=1e-3, optimizer=kind))
        step = TrainStep(model, made, Precision(device), float("inf"), in_backward)
        step.dry_run(window)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = [step(window if device == "cpu" else [window[0].pinned()])[0] for _ in range(5)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append([loss.item() for loss in outputs])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_paged_moments_are_beside_the_allocator_and_the_same_to_the_bit(tmp_path: Path) -> None:
    """Saved and restored they go on to the bit."""
    pytest.importorskip("bitsandbytes")
    window, found, allocated = [collate(ragged_samples())], [], []
    for optimizer in OPTIMIZERS[1:]:
        model = make_model(SMALL).cuda()
        made = make_optimizer(model.parameters(), TrainingConfig(lr=1e-3, optimizer=optimizer))
        step = TrainStep(model, made, Precision("cuda"))
        before = torch.cuda.memory_allocated()
        step.dry_run(window)
        allocated.append(torch.cuda.memory_allocated() - before)
        found.append([step(window)[0].item() for _ in range(3)])
        Saver(tmp_path / optimizer.name, "hash", step).save(Position(step=3))
        found.append([step(window)[0].item() for _ in range(3)])
        Saver(tmp_path / optimizer.name, "hash", step).restore()
        assert [step(window)[0].item() for _ in range(3)] == found[-1]
    assert found[:2] == found[2:]
    n_paged = sum(p.numel() for p in make_model(SMALL).parameters() if p.numel() >= MIN_PAGED)
    assert allocated[0] - allocated[1] >= 2 * n_paged > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_samples_have_the_loss_and_gradient_that_they_have_one_by_one(precision: str) -> None:
    """In 16 bit by PyTorch's variable-length attention, in fp32 sequence by sequence; neither waits for the device."""
    chosen = Precision("cuda") if precision == "fp32" else Precision("cuda", torch.bfloat16)
    found, samples = [], ragged_samples()
    for window in ([collate([sample]).pinned() for sample in samples], [end_to_end(samples).pinned()]):
        step = step_on("cuda", chosen)
        step.dry_run(window)  # kernels are loaded
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, norm = step(window)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((loss.item(), norm.item()))
    assert found[1] == pytest.approx(found[0], rel=1e-5 if precision == "fp32" else 2e-2)


def test_weights_in_4_bits_are_those_on_the_cpu_and_a_step_over_them_never_waits() -> None:
    """Quantized on either device; in fp32, and one token at a time too."""
    tokens, logits, window = torch.arange(40)[None], [], [collate([sample]).pinned() for sample in ragged_samples()]
    model = load_model(SMALL, "random", torch.device("cpu"), torch.float32)
    weights = {name: in_memory(weight) for name, weight in model.named_parameters()}
    for device in ("cpu", "cuda"):
        stored = build(SMALL)
        (storage := FourBit(torch.float32)).prepare(stored)
        materialize(stored, torch.device(device))
        for name, weight in weights.items():
            storage.load(stored, name, weight)
        with torch.no_grad():
            logits += [stored(tokens.to(device)).cpu(), stored(tokens[:, :1].to(device)).cpu()]
    assert relative(logits[2], logits[0]) <= 1e-3  # a weight between two levels may go either way
    assert relative(logits[3], logits[1]) <= 1e-3
    add_lora(stored, 4)
    step = TrainStep(stored, torch.optim.AdamW(stored.parameters(), lr=1e-3), Precision("cuda", torch.bfloat16))
    step(window)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(window)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_one_call_for_all_sequences_equals_a_call_for_each(n_kv_heads: int) -> None:
    if not (torch.cuda.get_device_capability() >= (8, 0) and has_varlen(64)):
        pytest.skip("needs FlashAttention, and PyTorch 2.10 for variable lengths")
    segments, results = end_to_end([sample_of(n) for n in (130, 2, 70)]).to(torch.device("cuda")).segments, []
    heads = (4, n_kv_heads, n_kv_heads)
    inputs = [torch.randn(1, 200 - 1, n, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in heads]
    assert takes_segments(inputs[0])
    for in_one_call in (False, True):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = attend(*leaves, segments, in_one_call)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(relative(a.float(), b.float()) <= 2e-2 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("combination", ["baseline", "ga_mp_lora"])
def test_a_run_reports_the_allocators_peaks_by_category(tmp_path, combination: str) -> None:
    arguments = [f"optim={combination}", "training.max_samples=16", "tracker=disabled", f"hydra.run.dir={tmp_path}/run"]
    done = run("llama_ft.train", *arguments, cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["peak_memory_reserved_mib"] >= result["peak_memory_mib"] > 0
    assert sum(result["memory_mib"].values()) == pytest.approx(result["peak_memory_mib"])


@pytest.mark.parametrize(
    "combination",
    [
        "baseline",
        "mp",
        "ga_mp_lora",
        "ga_mp_lora training.packing=512",
        "ga_mp_lora optim.gc=true gc.offload=cpu",
        "ga_mp_lora optim.gc=true gc.policy=selective",
    ],
)
def test_a_plan_says_what_the_allocator_will_say(tmp_path, combination: str) -> None:
    """On a model whose tensors are far larger than what kernels allocate for themselves."""
    told = [*f"optim={combination}".split(), "model.dim=768", "model.ffn_dim=2048", "checkpoint=random"]
    told.append("data.first=16")
    done = run("llama_ft.train", *told, "tracker=disabled", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    done = run("llama_ft.plan", *told, f"output={tmp_path}/plan", cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "plan" / "plan.json").read_text())["rows"]
    assert row["peak_memory_mib"] == pytest.approx(result["peak_memory_mib"], rel=0.05)
    assert row["reserved_mib"] == pytest.approx(result["peak_memory_reserved_mib"], rel=0.1)


def test_a_limit_makes_a_run_end_out_of_memory(tmp_path) -> None:
    arguments = [
        "measure.memory_limit_mib=20",
        "plan.enforce=false",
        "tracker=disabled",
        f"hydra.run.dir={tmp_path}/run",
    ]
    done = run("llama_ft.train", *arguments, cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "oom"


def test_a_cards_profile_brings_its_memory_and_its_16_bit_format(tmp_path) -> None:
    arguments = ["optim=ga_mp_lora", "gpu=t4_16gb", "training.max_samples=16", "tracker=disabled"]
    done = run("llama_ft.train", *arguments, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, env=GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["gpu"], result["compute_dtype"]) == ("t4_16gb", "float16")
    assert result["memory_limit_mib"] == 14773


def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path) -> None:
    losses = {}
    for name, extra in {"whole": [], "saved": ["training.save_every=3"]}.items():
        arguments = ["optim=mp_lora", "training.max_samples=8", "training.micro_batch_size=1", "tracker=disabled"]
        arguments.append(f"hydra.run.dir={tmp_path}/{name}")
        done = run("llama_ft.train", *arguments, *extra, cwd=tmp_path, env=GPU)
        assert done.returncode == 0, done.stdout + done.stderr
        if name == "saved":  # as if it had been killed after its sixth step
            (tmp_path / name / "result.json").unlink()
            done = run("llama_ft.train", *arguments, "training.resume=true", cwd=tmp_path, env=GPU)
            assert "resuming after optimizer step 6" in done.stdout
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["saved"] == pytest.approx(losses["whole"], rel=1e-3)


class LateMeter(StepMeter):
    """Reads a step when all that the device was given is done, the next step's copy included."""

    def flush(self) -> StepMetrics | None:
        torch.cuda.synchronize()
        return super().flush()


def test_two_steps_have_two_losses() -> None:
    """Though the copy of the second loss is there before the first is read."""
    device = torch.device("cuda", 0)
    meter, lines = LateMeter(4, device), []
    for step in range(1, 5):
        loss = torch.tensor(float(step), device=device)
        lines.append(meter.record(StepOutput(loss, loss, 0.1, 1)))
        lines.append(meter.flush() if step == 2 else None)
    assert [line.loss for line in [*lines, meter.flush()] if line is not None] == [1, 2, 3, 4]


@pytest.mark.parametrize("model", ["llama2_7b", "llama3_2_1b"])
def test_attention_takes_the_kernels_that_the_planner_knows(model: str) -> None:
    config, device = preset("model", model, ModelConfig), torch.device("cuda", 0)
    has_flash = torch.cuda.get_device_capability() >= (8, 0)
    assert attention_kernel(config, torch.float16, device) == ("flash" if has_flash else "efficient")
    assert attention_kernel(config, torch.float32, device) == "efficient"


def test_new_lengths_take_no_longer_than_old_ones() -> None:
    step, milliseconds = step_on("cuda", Precision("cuda", torch.float16)), []
    windows = [[collate([sample_of(n)])] for n in range(60, 101)]
    for _ in range(2):
        for window in windows:
            torch.cuda.synchronize()
            began = time.perf_counter()
            step(window)
            torch.cuda.synchronize()
            milliseconds.append(1000 * (time.perf_counter() - began))
    assert median(milliseconds[1:41]) <= 3 * median(milliseconds[41:])


def test_a_run_on_the_cpu_makes_no_context(tmp_path: Path) -> None:
    said = tmp_path / "said"
    code = (
        "import atexit, pathlib\n"
        "def say():\n"
        "    torch = sys.modules.get('torch')\n"
        f"    pathlib.Path({str(said)!r}).write_text(str(torch is not None and torch.cuda.is_initialized()))\n"
        "atexit.register(say)"
    )
    environment = GPU | injected(tmp_path / "site", into="llama_ft.launch.child", code=code)
    arguments = ["gpu=cpu", "training.max_samples=4", "tracker=disabled", f"hydra.run.dir={tmp_path}/run"]
    done = run("llama_ft.train", *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said.read_text() == "False"


def test_more_ranks_than_gpus_are_refused(tmp_path: Path) -> None:
    arguments = ["parallel=ddp", "parallel.processes=1000", "tracker=disabled", f"hydra.run.dir={tmp_path}/run"]
    done = run("llama_ft.train", *arguments, cwd=tmp_path, env=GPU)
    assert done.returncode == 1
    assert f"PyTorch sees {torch.cuda.device_count()}" in done.stdout + done.stderr


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_tracker_does_not_raise_the_peak(precision: torch.dtype) -> None:
    step, peaks = step_on("cuda", Precision("cuda", precision)), []
    hardest = [[collate([sample_of(128)])]]
    use = track_memory(step, hardest)
    for again in (lambda: track_memory(step, hardest), lambda: step.dry_run(hardest[0])):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        again()
        peaks.append(torch.cuda.max_memory_allocated() / MIB)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)
    assert use.peak_mib <= peaks[1] + 1


def test_a_new_number_of_keys_takes_no_longer_than_an_old_one() -> None:
    """Each token of the first text meets a new one, each of the second one that has been met."""
    model, seconds = make_model(SMALL).cuda().half().eval(), []
    with torch.inference_mode():
        for _ in range(2):
            state = GenerationState(model, [list(range(5, 25))], 64, kv_cache=True)
            for _ in range(64):
                began = time.perf_counter()
                state.append(state.next_logits().argmax(-1))
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
    assert median(seconds[8:64]) <= 3 * median(seconds[72:])


@pytest.mark.parametrize("free_mib", [600, 300])
def test_a_full_card_is_out_of_memory(tmp_path: Path, free_mib: int) -> None:
    excess = torch.cuda.mem_get_info()[0] - free_mib * MIB
    held = torch.empty(excess, dtype=torch.uint8, device="cuda")
    arguments = ["model.dim=1024", "model.ffn_dim=4096", "checkpoint=random", "plan.enforce=false", "tracker=disabled"]
    done = run("llama_ft.train", *arguments, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, env=GPU)
    del held
    torch.cuda.empty_cache()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "oom", done.stdout + done.stderr


def test_checkpointing_changes_no_gradient() -> None:
    """In bf16, with dropout: the blocks that are run again draw the same numbers."""
    gradients = []
    for checkpointed in (False, True):
        model = make_model(SMALL).cuda()
        torch.manual_seed(0)
        add_lora(model, 4, dropout=0.5)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)  # of zeros nothing would reach lora_A
        if checkpointed:
            checkpoint_layers(model)
        model.train()
        torch.manual_seed(0)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(collate(ragged_samples()).tokens.cuda())
        logits.float().square().mean().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    for name, gradient in gradients[0].items():
        assert relative(gradients[1][name], gradient) <= 1e-3, name


@pytest.mark.parametrize(("selective", "offload"), [(True, False), (False, True), (True, True)])
def test_selected_products_and_offloaded_inputs_change_no_bit(
    selective: bool, offload: bool, request: pytest.FixtureRequest
) -> None:
    """In bf16, with dropout, over micro-batches of several lengths; nothing waits for the device."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True, warn_only=True)  # attention's backward pass adds in any order else
    found = []
    for chosen in ({}, {"selective": selective, "offload": offload}):
        model = make_model(ModelConfig("deep", 512, 8, 8, 8, 1024, vocab_size=300, max_seq_len=1024)).cuda()
        torch.manual_seed(0)
        add_lora(model, 4, dropout=0.3, targets=["wq", "w2"])
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        checkpoint_layers(model, **chosen)
        model.train()
        tokens = [torch.full((4, n), 7).pin_memory() for n in (1000, 33, 500)]
        for is_first in (True, False):  # kernels are loaded, and pinned memory is allocated
            model.zero_grad()
            torch.manual_seed(1)
            torch.cuda.set_sync_debug_mode("default" if is_first else "error")
            try:
                for each in tokens:
                    with torch.autocast("cuda", torch.bfloat16):
                        logits = model(each.to("cuda", non_blocking=True))
                    logits.float().square().mean().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_offloaded_inputs_leave_the_card_in_the_same_way_each_time() -> None:
    """And are used again on the host: a second pass pins no memory."""
    peaks, pinned = [], []
    tokens = torch.full((8, 512), 7, device="cuda")
    for offload in (False, True):
        model = make_model(ModelConfig("deep", 512, 16, 8, 8, 512, vocab_size=300, max_seq_len=512)).cuda()
        add_lora(model, 4)
        checkpoint_layers(model, offload=offload)
        for _ in range(4):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            model(tokens).sum().backward()
            peaks.append(torch.cuda.max_memory_allocated())
            pinned.append(torch.cuda.host_memory_stats()["num_host_alloc"])
        del model
    kept, offloaded = peaks[1:4], peaks[5:]
    assert len(set(kept)) == len(set(offloaded)) == 1
    assert kept[0] - offloaded[0] >= 12 * 8 * 512 * 512 * 4  # of 16 inputs
    assert pinned[4:] == [pinned[4]] * 4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_over_nccl_is_that_of_one_process(tmp_path: Path, strategy: str) -> None:
    """With one process, as one GPU allows: it has the losses, and what is counted sums up to the allocator's peak."""
    losses = {}
    for parallel in ("none", strategy):
        folder = tmp_path / parallel
        split = [f"parallel={parallel}", "parallel.processes=1"] if parallel != "none" else []
        told = [
            "optim=mp_lora",
            "optim.gc=true",
            "lora.dropout=0",
            "training.max_samples=8",
            "tracker=disabled",
            *split,
        ]
        done = run("llama_ft.train", *told, *split, f"hydra.run.dir={folder}", cwd=tmp_path, env=GPU)
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads((folder / "result.json").read_text())
        assert sum(result["memory_mib"].values()) == pytest.approx(result["peak_memory_mib"])
        losses[parallel] = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[strategy] == pytest.approx(losses["none"], rel=1e-2)
