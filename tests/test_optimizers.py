"""AdamW with moments in 8 bits against bitsandbytes' own class; updates within the backward pass and after it."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from conftest import run
from helpers.training import make_step, name, ragged_samples
from torch import Tensor, nn

import llama_ft as lf
from llama_ft import bitsandbytes as door
from llama_ft.config import Dtype, OptimConfig, Optimizer, TrainConfig, TrainingConfig, UserError
from llama_ft.data.collate import Padding, collate
from llama_ft.training.optimizers import AdamW8bit, make_optimizer
from llama_ft.training.position import Position
from llama_ft.training.saver import Saver
from llama_ft.training.step import TrainStep

SHAPES = ((70, 100), (4096,), (4095,), (3, 5))  # of 27.3 blocks, of 16; and two with moments in fp32
IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": math.inf}


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, n_steps: int = 20) -> None:
    """Steps along random gradients that have a direction, of all sizes, with a learning rate that changes."""
    generator = torch.Generator().manual_seed(1)
    for number in range(n_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            sizes = torch.logspace(-6, 0, parameter.numel()).view_as(parameter)
            parameter.grad = ((noise + 0.5) * sizes).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_bitsandbytes_own_class_to_the_bit(dtype: torch.dtype, decay: float) -> None:
    ours, theirs = weights(dtype), weights(dtype)
    config = TrainingConfig(lr=1e-2, optimizer=Optimizer.adamw_8bit, weight_decay=decay)
    optimizer, reference = make_optimizer(ours, config), bitsandbytes.optim.AdamW8bit(theirs, 1e-2, weight_decay=decay)
    train(ours, optimizer)
    train(theirs, reference)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)
        state, expected = optimizer.state[our], reference.state[their]
        assert state["step"].item() == expected["step"] == 20
        assert state["exp_avg"].dtype == (torch.uint8 if our.numel() >= 4096 else torch.float32)
        names = {"exp_avg": "state1", "exp_avg_sq": "state2", "absmax": "absmax1", "absmax_sq": "absmax2"}
        assert all(torch.equal(state[name], expected[names[name]]) for name in state if name != "step")


@pytest.mark.parametrize("n_steps", [1, 20])
def test_its_moments_are_those_of_32_bits_to_their_rounding(n_steps: int) -> None:
    """Each step rounds by half a gap of the map at most, of which the next steps forget a tenth each."""
    ours, exact, start = weights(), weights(), weights()
    optimizer, reference = AdamW8bit(ours, 1e-2), torch.optim.AdamW(exact, 1e-2, weight_decay=0.0)
    train(ours, optimizer, n_steps)
    train(exact, reference, n_steps)
    map_of_8_bits = bitsandbytes.functional.create_dynamic_map(True)
    half_a_gap = map_of_8_bits.diff().max() / 2
    state, expected = optimizer.state[ours[1]], reference.state[exact[1]]["exp_avg"].view(-1, 256)
    moments = map_of_8_bits[state["exp_avg"].long()].view(-1, 256) * state["absmax"][:, None]
    off = (moments - expected).abs().amax(1) / expected.abs().amax(1)
    assert 0 < off.max() <= 1.01 * half_a_gap * sum(0.9**i for i in range(n_steps))
    for our, other, begin in zip(ours, exact, start, strict=True):
        assert (our - other).norm() <= (0.02 if our.numel() >= 4096 else 1e-5) * (other - begin).norm()


def test_a_state_of_zeros_is_that_of_the_beginning() -> None:
    ours, again = weights(), weights()
    first, second = AdamW8bit(ours, 1e-2), AdamW8bit(again, 1e-2)
    train(again, second, 3)
    for parameter, begin in zip(again, weights(), strict=True):
        parameter.data.copy_(begin)
        for tensor in second.state[parameter].values():
            tensor.zero_()
    train(ours, first)
    train(again, second)
    assert all(map(torch.equal, ours, again))


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    door.bitsandbytes.cache_clear()
    config = TrainingConfig(optimizer=Optimizer.adamw_8bit)
    said = "training.optimizer=adamw_8bit needs the package bitsandbytes: pip install 'llama_ft[quant]'"
    with pytest.raises(UserError, match=re.escape(said)):
        make_optimizer(weights(), config)
    make_optimizer(weights(), TrainingConfig())  # which is not asked for it
    door.bitsandbytes.cache_clear()


# Within the backward pass


def in_backward(config: TrainConfig, optimizer: Optimizer, is_on: bool = True) -> TrainConfig:
    """With updates in the backward pass, or after it but as unclipped."""
    training = TrainingConfig(lr=1e-2, weight_decay=0.1, optimizer=optimizer, **IN_BACKWARD)
    return replace(config, training=replace(training, optimizer_in_backward=is_on))


def steps(step: TrainStep, n: int = 4) -> list[float]:
    """Losses and gradient norms of so many steps."""
    windows = [[collate(ragged_samples()[i : i + 3], Padding(step.precision.pad_multiple))] for i in range(n)]
    return [value.item() for window in windows for value in step(window)]


def parameters(step: TrainStep) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}


each_optimizer = pytest.mark.parametrize("optimizer", [Optimizer.adamw, Optimizer.adamw_8bit, Optimizer.sgd])
OPTIMS = [OptimConfig(), OptimConfig(gc=True), OptimConfig(mp=True, gc=True), OptimConfig(lora=True)]


@each_optimizer
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optim", OPTIMS, ids=name)
def test_updates_in_backward_equal_those_after_it_to_the_bit(
    small_config: TrainConfig, optimizer: Optimizer, tied: bool, optim: OptimConfig
) -> None:
    small_config.model = replace(small_config.model, tie_word_embeddings=tied)
    small_config.mp.trainable_weights = Dtype.compute
    found = []
    for is_on in (False, True):
        step = make_step(in_backward(small_config, optimizer, is_on), optim)
        found.append((steps(step), parameters(step)))
    (losses, after), (again, within) = found
    assert losses == again
    assert all(torch.equal(after[name], within[name]) for name in after)
    assert losses[1] > 0
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_one_weights_gradient_is_alive_at_a_time(small_config: TrainConfig) -> None:
    step, alive = make_step(in_backward(small_config, Optimizer.sgd), OptimConfig(gc=True)), []
    step.optimizer.register_step_pre_hook(
        lambda *_: alive.append(sum(parameter.grad is not None for parameter in step.model.parameters()))
    )
    steps(step, 1)
    assert alive == [1] * len(list(step.model.parameters()))


def test_between_steps_a_backward_pass_of_others_updates_nothing(small_config: TrainConfig) -> None:
    step = make_step(in_backward(small_config, Optimizer.adamw), OptimConfig())
    steps(step, 1)
    before = parameters(step)
    step.model(collate(ragged_samples()).tokens).sum().backward()
    assert all(torch.equal(before[name], parameter) for name, parameter in step.model.named_parameters())


@each_optimizer
def test_it_resumes_to_the_bit_and_a_dry_run_leaves_no_trace(
    small_config: TrainConfig, tmp_path: Path, optimizer: Optimizer
) -> None:
    config, optim = in_backward(small_config, optimizer), OptimConfig(gc=True, neft=True)
    undisturbed, window = steps(make_step(config, optim)), [collate(ragged_samples())]
    step = make_step(config, optim)
    step.dry_run(window)
    assert steps(step) == undisturbed
    Saver(tmp_path, "hash", step).save(Position(step=4))
    losses = steps(step)
    again = make_step(config, optim)
    again.dry_run(window)
    assert Saver(tmp_path, "hash", again).restore() == Position(step=4)
    assert steps(again) == losses


REFUSED = {
    "training.max_grad_norm=1": "training.max_grad_norm=1 needs them all at once: give inf",
    "optim=ga": "an update has 8 micro-batches: leave optim.ga out",
    "training.packing=100 training.micro_batch_size=2": "give training.micro_batch_size=1",
    "optim=mp mp.dtype=fp16": "in fp16 an overflow skips the whole update: use bf16, or leave optim.mp out",
}


@pytest.mark.process
@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("overrides", REFUSED)
def test_what_it_cannot_go_with_is_refused_before_anything_starts(tmp_path: Path, command: str, overrides: str) -> None:
    keys = ["training.optimizer_in_backward=true", "training.max_grad_norm=inf", *overrides.split()]
    keys += [] if "optim=" in overrides else ["optim=baseline"]
    if "max_grad_norm" in overrides:
        keys.remove("training.max_grad_norm=inf")
    done = run(f"llama_ft.{command}", *keys, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith(REFUSED[overrides])


@pytest.mark.process
@pytest.mark.parametrize("command", ["train", "plan"])
def test_paged_moments_are_refused_on_the_cpu(tmp_path: Path, command: str) -> None:
    keys = ("optim=lora", "gpu=cpu", "training.optimizer=paged_adamw_8bit")
    done = run(f"llama_ft.{command}", *keys, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("on the CPU use training.optimizer=adamw_8bit")


def test_one_accumulation_step_is_no_accumulation_and_auto_may_be_fp16(small_config: TrainConfig) -> None:
    from llama_ft.techniques.mixed_precision import Precision

    training = TrainingConfig(**IN_BACKWARD)
    one = replace(small_config, optim=OptimConfig(ga=True), ga=replace(small_config.ga, steps=1), training=training)
    assert one.accumulation_steps == 1
    auto = replace(small_config, optim=OptimConfig(mp=True), training=training)
    assert Precision.of(auto, "cuda", has_bf16=True).compute == torch.bfloat16
    with pytest.raises(UserError, match="in fp16 an overflow skips"):
        Precision.of(auto, "cuda", has_bf16=False)


def test_the_library_takes_them_too() -> None:
    model, tokenizer = lf.load("tiny")
    samples = lf.encode(lf.read_records()[:6], tokenizer)
    uses = [lf.measure_memory(model, samples, optimizer=kind) for kind in ("adamw", "adamw_8bit")]
    assert uses[1].max_mib["optimizer_state"] < 0.27 * uses[0].max_mib["optimizer_state"]
    in_backward = lf.measure_memory(model, samples, optimizer="adamw_8bit", optimizer_in_backward=True)
    assert in_backward.max_mib["gradient"] < 0.5 * uses[1].max_mib["gradient"]
    options = {"optimizer": "adamw_8bit", "optimizer_in_backward": True, "epochs": 3}
    losses = [metrics.loss for metrics in lf.finetune(model, samples, lr=1e-3, max_grad_norm=math.inf, **options)]
    assert losses[-1] < losses[0]
    for more, words in (
        ({"accumulation_steps": 2}, "2 micro-batches"),
        ({"precision": "fp16"}, "in fp16"),
        ({"optimizer": "paged_adamw_8bit"}, "needs a CUDA GPU"),
        ({"max_grad_norm": 1.0}, "needs them all at once"),
    ):
        with pytest.raises(UserError, match=words):
            next(lf.finetune(model, samples, **{"max_grad_norm": math.inf, **options, **more}))


def test_what_overflows_in_fp16_is_skipped_but_its_state_is_made(tiny_config: TrainConfig) -> None:
    """So that memory is counted, and a run can be resumed, whatever the first scale is."""
    tiny_config.mp.dtype, tiny_config.training.optimizer = Dtype.fp16, Optimizer.adamw_8bit
    step = make_step(tiny_config, OptimConfig(mp=True, lora=True))
    step.scaler._init_scale = 2.0**40
    before = [each.detach().clone() for each in step.optimizer.param_groups[0]["params"]]
    step([collate(ragged_samples(), Padding(32))])
    after = step.optimizer.param_groups[0]["params"]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert step.scaler.get_scale() < 2.0**40
    for state in step.optimizer.state.values():
        assert all(not tensor.any() for tensor in state.values())
    assert len(step.optimizer.state) == len(before)
