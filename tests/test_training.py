"""The step, the schedule and the loop: determinism, no traces of the dry run, every combination learns."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers.models import relative
from helpers.training import COMBINATIONS, make_step, name, ragged_samples
from torch.optim import lr_scheduler

from llama_ft.config import Dtype, OptimConfig, Optimizer, Schedule, TrainConfig, TrainingConfig, UserError
from llama_ft.data.collate import Padding, collate
from llama_ft.data.dataset import load_data
from llama_ft.records.metrics import METRICS_FILE, MetricsFile, StepMetrics, read_metrics
from llama_ft.techniques.lora import LoRALinear
from llama_ft.training.loop import StepOutput, Windows, train
from llama_ft.training.metrics import StepMeter, check_losses
from llama_ft.training.optimizers import make_optimizer
from llama_ft.training.position import Position
from llama_ft.training.saver import Saver
from llama_ft.training.setup import lr_factor, make_schedule
from llama_ft.training.step import TrainStep, evaluate


def parameters(step: TrainStep) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in step.model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("optim", COMBINATIONS, ids=name)
def test_every_combination_overfits_one_batch(small_config, optim) -> None:
    lora = optim.lora
    small_config.training.lr = 3e-2 if lora else 5e-3
    small_config.ga.steps = 2
    small_config.data.first = 2
    small_config.lora.targets = ["wq", "wv", "w1", "w2", "w3", "output"]
    step, n = make_step(small_config, optim), small_config.accumulation_steps
    samples = load_data(small_config).samples
    window = [collate(samples[i::n], Padding(step.precision.pad_multiple)) for i in range(n)]
    frozen = {n: p.detach().clone() for n, p in step.model.named_parameters() if not p.requires_grad}
    losses = [step(window)[0].item() for _ in range(40)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] <= (0.8 * losses[0] if lora else 0.1)
    after = dict(step.model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())
    assert all((m.lora_B != 0).any() for m in step.model.modules() if isinstance(m, LoRALinear))


def run_steps(config: TrainConfig, optim: OptimConfig, dry_run: bool) -> tuple[list[float], dict]:
    step = make_step(config, optim)
    epoch = list(Windows.over(load_data(config).samples, step, TrainingConfig(), config.accumulation_steps).epoch(0))
    if dry_run:
        step.dry_run(epoch[-1])
        step.dry_run(epoch[-1])
    return [step(window)[0].item() for window in epoch], parameters(step)


OPTIMIZERS = [(Optimizer.adamw, 0.9), (Optimizer.adamw_8bit, 0.9), (Optimizer.sgd, 0.9), (Optimizer.sgd, 0.0)]
each_optimizer = pytest.mark.parametrize(("optimizer", "momentum"), OPTIMIZERS)


@each_optimizer
@pytest.mark.parametrize("optim", [OptimConfig(ga=True, lora=True, neft=True), OptimConfig(mp=True, gc=True)], ids=name)
def test_runs_repeat_to_the_bit_and_a_dry_run_leaves_no_trace(small_config, optim, optimizer, momentum) -> None:
    small_config.training.optimizer, small_config.training.momentum = optimizer, momentum
    small_config.data.first = 12
    small_config.training.weight_decay = 0.1
    plain, again, dry_run = (run_steps(small_config, optim, dry_run) for dry_run in (False, False, True))
    assert plain[0] == again[0] == dry_run[0]
    assert equal(plain[1], again[1])
    assert equal(plain[1], dry_run[1])


def test_a_dry_run_leaves_no_trace_in_an_fp16_scaler(small_config) -> None:
    small_config.mp.dtype = Dtype.fp16
    step = make_step(small_config, OptimConfig(mp=True, lora=True))
    before = step.scaler.state_dict()
    step.dry_run([collate(ragged_samples())])
    assert step.scaler.state_dict() == before
    assert step.scaler.is_enabled()


def test_schedule_rises_linearly_and_falls_as_half_a_cosine() -> None:
    factors = [lr_factor(step, total_steps=110, warmup_steps=10) for step in range(110)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5)  # halfway down
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3


def warmed(ratio: float, schedule: Schedule) -> TrainingConfig:
    return TrainingConfig(warmup_ratio=ratio, schedule=schedule)


def rates_of(make, total: int) -> list[float]:
    """The learning rate of each of so many steps; the peak is 2."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = make(optimizer), []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (1, 1.0), (2, 0.03), (7, 1.0), (200, 0.03)])
def test_schedule_of_any_length_stays_between_0_and_the_peak(total: int, ratio: float, schedule: Schedule) -> None:
    rates = rates_of(lambda optimizer: make_schedule(optimizer, total, warmed(ratio, schedule)), total)
    assert all(0 < rate <= 2.0 for rate in rates)
    assert max(rates) == 2.0


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (Schedule.cosine, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)),
        (Schedule.linear, lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=40)),
        (Schedule.constant, lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1.0)),
    ],
)
def test_schedules_fall_as_pytorchs_do_and_go_on_anywhere(schedule, theirs) -> None:
    ours = rates_of(lambda optimizer: make_schedule(optimizer, 50, warmed(0.2, schedule)), 50)
    assert ours[10:] == pytest.approx(rates_of(theirs, 40))
    for done in (3, 10, 31):
        assert rates_of(lambda opt, n=done: make_schedule(opt, 50, warmed(0.2, schedule), n), 50 - done) == ours[done:]


def test_optimizer_is_fused_adamw_over_the_trainable_parameters() -> None:
    free, frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = make_optimizer([free, frozen], TrainingConfig(lr=0.5, weight_decay=0.25))
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert group["params"] == [free]
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.5, 0.25, True)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sgd_updates_every_weight_as_pytorchs_plain_form_does(dtype, momentum, decay) -> None:
    """Divided by what clipping asks for; a fused kernel of PyTorch's leaves most weights in 16 bit as they are."""
    config = TrainingConfig(lr=0.1, optimizer=Optimizer.sgd, momentum=momentum, weight_decay=decay)
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.randn(70, 5).to(dtype)) for _ in range(2))
    theirs.data.copy_(ours)
    optimizer, plain = make_optimizer([ours], config), torch.optim.SGD([theirs], 0.1, momentum, 0.0, decay)
    fused = optimizer.defaults["fused"]
    assert fused == (dtype != torch.bfloat16)
    for _ in range(3):
        gradient = torch.randn(70, 5).to(dtype)
        ours.grad, theirs.grad = gradient * (4 if fused else 1), gradient.clone()
        if fused:
            optimizer.grad_scale = torch.tensor(4.0)
        optimizer.step()
        plain.step()
    assert relative(ours, theirs) <= 1e-6
    assert [tensor.shape for state in optimizer.state.values() for tensor in state.values()] == [(70, 5)] * (
        momentum > 0
    )


@each_optimizer
def test_every_optimizer_learns_with_16_bit_weights_too(small_config, optimizer, momentum) -> None:
    small_config.training.optimizer, small_config.training.momentum = optimizer, momentum
    small_config.training.lr = 0.3 if optimizer is Optimizer.sgd else 5e-3
    for weights in (Dtype.fp32, Dtype.compute):
        small_config.mp.trainable_weights = weights
        step = make_step(small_config, OptimConfig(mp=True))
        window = [collate(ragged_samples(), Padding(32))]
        losses = [step(window)[0].item() for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0]


@each_optimizer
def test_saved_and_restored_it_goes_on_to_the_bit(small_config, tmp_path, optimizer, momentum) -> None:
    small_config.training.optimizer, small_config.training.momentum = optimizer, momentum
    window = [collate(ragged_samples())]
    step = make_step(small_config, OptimConfig(lora=True, neft=True))
    step(window)
    Saver(tmp_path, "hash", step).save(Position(step=1))
    losses = [step(window)[0].item() for _ in range(3)]
    again = make_step(small_config, OptimConfig(lora=True, neft=True))
    again.dry_run(window)
    assert Saver(tmp_path, "hash", again).restore() == Position(step=1)
    assert [again(window)[0].item() for _ in range(3)] == losses
    assert equal(parameters(step), parameters(again))


def test_momentum_begins_at_0_where_loss_scaling_skips_the_first_step(small_config) -> None:
    small_config.mp.dtype, small_config.training.optimizer = Dtype.fp16, Optimizer.sgd
    step = make_step(small_config, OptimConfig(mp=True))
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": 2.0**24})
    before, window = parameters(step), [collate(ragged_samples())]
    step(window)
    assert equal(before, parameters(step))
    assert all(not tensor.any() for state in step.optimizer.state.values() for tensor in state.values())


@each_optimizer
def test_a_step_on_the_cpu_asks_nothing_of_a_gpu_that_is_there(monkeypatch, small_config, optimizer, momentum) -> None:
    def asked() -> None:
        raise AssertionError("this would make a context there")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", asked)
    small_config.training.optimizer, small_config.training.momentum = optimizer, momentum
    make_step(small_config, OptimConfig())([collate(ragged_samples())])


@each_optimizer
def test_gradient_is_clipped_to_the_norm_and_reported_unclipped(small_config, optimizer, momentum) -> None:
    small_config.training.optimizer, small_config.training.momentum = optimizer, momentum
    step = make_step(small_config, OptimConfig())
    step.update.max_grad_norm = 1e-3
    seen = []
    step.optimizer.register_step_post_hook(  # after it, since the fused optimizer scales them
        lambda optimizer, *_: seen.append(
            torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]).norm().item()
        )
    )
    _, norm = step([collate(ragged_samples())])
    assert seen == pytest.approx([1e-3], rel=1e-3)
    assert norm.item() > 0.1


def run_loop(small_config: TrainConfig, epochs: int = 2, made: TrainStep | None = None) -> list[StepMetrics]:
    """Train on six samples, two in a window: three steps an epoch. Nothing is written."""
    small_config.data.first = 6
    step = made or make_step(small_config, OptimConfig())
    data = Windows.over(load_data(small_config).samples, step, TrainingConfig(), 2)
    assert data.steps_per_epoch == 3
    schedule = make_schedule(step.optimizer, 3 * epochs, TrainingConfig(warmup_ratio=0.0))
    meter = StepMeter(3 * epochs, step.device, step.scaler.is_enabled())
    read = [meter.record(output) for output in train(step, schedule, data, epochs, Position())]
    return [metrics for metrics in [*read, meter.flush()] if metrics is not None]


@pytest.mark.parametrize("is_fp16", [False, True])
@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "the loss of optimizer step 2 is nan"),
        (3.0, math.inf, "the gradient's norm at optimizer step 2 is inf"),
        (7.6, 0.0, "the gradient's norm at optimizer step 2 is 0.0"),
        (0.0, 0.0, None),  # all is learned
    ],
)
def test_training_that_went_wrong_is_stopped_and_fp16_named_where_it_is_on(loss, norm, reason, is_fp16) -> None:
    meter = StepMeter(2, torch.device("cpu"), is_fp16)
    meter.record(StepOutput(torch.tensor(7.6), torch.tensor(1.0), 1e-3, 10))
    meter.record(StepOutput(torch.tensor(loss), torch.tensor(norm), 1e-3, 10))
    if reason is None or (is_fp16 and norm == math.inf):  # then the step is skipped
        assert meter.flush().loss == loss
    else:
        with pytest.raises(UserError, match=rf"{reason}: training stopped; lower training.lr") as raised:
            meter.flush()
        assert ("fp16" in str(raised.value)) == is_fp16


def test_a_model_whose_adapter_gets_no_gradient_is_trained_all_the_same() -> None:
    meter = StepMeter(1, torch.device("cpu"))
    meter.record(StepOutput(torch.tensor(3.0), torch.tensor(0.0), 1e-3, 10))
    assert meter.flush().grad_norm == 0


def test_a_last_step_that_makes_the_model_overflow_is_an_error(small_config) -> None:
    """Activations whose squares are infinite are normed to 0: nothing is NaN, all tokens are equally probable."""
    step = make_step(small_config, OptimConfig(lora=True))
    batches = [collate(ragged_samples())]
    before, _ = evaluate(step, batches)
    check_losses(before, before + 3, step.model.config.vocab_size)
    for parameter in step.model.parameters():
        parameter.data.fill_(1e30)
    after, _ = evaluate(step, batches)
    with pytest.raises(UserError, match="the weights overflow"):
        check_losses(before, after, step.model.config.vocab_size)


def test_metrics_have_a_line_for_each_optimizer_step(small_config, tmp_path) -> None:
    steps = run_loop(small_config)
    tokens = sum(len(sample) for sample in load_data(small_config).samples)
    assert [metrics.step for metrics in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[2].tokens == tokens
    assert steps[-1].tokens == 2 * tokens
    assert steps[0].loss == pytest.approx(math.log(2048), rel=0.02)  # untrained weights know nothing
    assert steps[0].lr == small_config.training.lr
    assert all(math.isfinite(n) for metrics in steps for n in (metrics.loss, metrics.grad_norm, metrics.tokens_per_s))
    for written in (steps[:4], steps[4:]):  # a resumed run goes on after what is there
        with MetricsFile(tmp_path / METRICS_FILE) as file:
            for metrics in written:
                file.write(metrics)
    assert read_metrics(tmp_path) == steps


def test_a_loss_that_is_not_finite_stops_and_names_its_step(small_config) -> None:
    small_config.training.lr = 1e30
    with pytest.raises(UserError, match=r"the loss of optimizer step \d+ is (nan|inf)"):
        run_loop(small_config, epochs=4)


def test_a_gradient_that_is_not_finite_stops_a_run_without_loss_scaling(small_config) -> None:
    step = make_step(small_config, OptimConfig())
    step.model.output.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"the gradient's norm at optimizer step 1 is (nan|inf)"):
        run_loop(small_config, made=step)


def test_windows_are_counted_by_arithmetic_and_can_begin_anywhere(small_config) -> None:
    step, samples = make_step(small_config, OptimConfig()), ragged_samples()
    for size, accumulation in itertools.product((1, 3, 8, 20), (1, 2, 5)):
        data = Windows.over(samples, step, TrainingConfig(micro_batch_size=size, seed=3), accumulation)
        whole = list(data.epoch(1))
        assert len(whole) == data.steps_per_epoch
        assert sum(batch.n_tokens for window in whole for batch in window) == sum(map(len, samples))
        later = list(data.epoch(1, 1))
        assert [[b.tokens.tolist() for b in w] for w in later] == [[b.tokens.tolist() for b in w] for w in whole[1:]]


@pytest.mark.parametrize("optim", [optim for optim in COMBINATIONS if optim.mp], ids=name)
def test_fp16_steps_like_fp32_with_fp32_trainable_weights(small_config, optim) -> None:
    small_config.mp.dtype, small_config.lora.dropout, small_config.ga.steps = Dtype.fp16, 0.0, 2
    step, n = make_step(small_config, optim), small_config.accumulation_steps
    stored = {p.dtype for p in step.model.parameters() if not p.requires_grad}
    assert stored == ({torch.float16} if optim.lora else set())
    assert {p.dtype for p in step.optimizer.param_groups[0]["params"]} == {torch.float32}
    window = [collate(ragged_samples()[i::n], Padding(32)) for i in range(n)]
    losses = [step(window)[0].item() for _ in range(4)]
    exact = make_step(small_config, replace(optim, mp=False))
    assert losses == pytest.approx([exact(window)[0].item() for _ in range(4)], rel=5e-3)
    assert losses[-1] < losses[0]


def test_fp16_steps_that_overflow_are_skipped_until_the_scale_fits(small_config) -> None:
    small_config.mp.dtype = Dtype.fp16
    step = make_step(small_config, OptimConfig(mp=True))
    scale = 2.0**24
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": scale})
    weights, updates = [parameters(step)], []
    step.optimizer.register_step_post_hook(lambda *_: weights.append(parameters(step)))
    steps = run_loop(small_config, epochs=5, made=step)
    for before, after in itertools.pairwise(weights):
        updates.append(not equal(before, after))
    skipped = [metrics.grad_norm is None for metrics in steps]
    assert skipped[0]
    assert not skipped[-1]
    assert updates == [not skip for skip in skipped]
    assert step.scaler.get_scale() == scale / 2 ** sum(skipped)
    assert all(math.isfinite(metrics.loss) for metrics in steps)


def test_evaluation_is_the_mean_over_target_tokens_and_changes_nothing(small_config) -> None:
    step = make_step(small_config, OptimConfig(lora=True))
    samples = load_data(small_config).samples[:5]
    before = parameters(step)
    one_by_one, _ = evaluate(step, [collate([sample]) for sample in samples])
    assert one_by_one == pytest.approx(evaluate(step, [collate(samples)])[0], rel=1e-5)
    assert equal(before, parameters(step))
    assert step.model.training
