"""The measurements of `experiments.mixed_precision`."""

from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

from experiments.shared import CPU, gradient_of, load_tiny, relative_error, sample_records, tiny_tokenizer
from experiments.study import Log, Numbers
from llama_ft.cli import composed_config
from llama_ft.config import PlanConfig, TrainingConfig
from llama_ft.data.collate import Batch, Padding, collate
from llama_ft.data.template import ALPACA_TEMPLATE
from llama_ft.kernels import use_products_of
from llama_ft.model.storage import Storage
from llama_ft.model.transformer import Transformer
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.lengths import blank_samples
from llama_ft.planning.processes import side_by_side
from llama_ft.techniques.mixed_precision import CPU_16BIT_PAD_MULTIPLE, Precision
from llama_ft.training.optimizers import make_optimizer
from llama_ft.training.step import TrainStep, summed_loss

N_RECORDS, N_STEPS, STEP_LR = 4, 10, 1e-3  # the records, and the steps that lower the loss on them
COURSE_LR = 1e-5
OVERFLOW_AT, GROWTH_INTERVAL = 100, 2000  # optimizer steps: the one that overflows; GradScaler's interval
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
LONGEST = 1024  # tokens of a sample in a micro-batch
SETTINGS = {  # combination and mp.frozen_weights, without and with mixed precision
    "full": (("baseline", "compute"), ("mp", "compute")),
    "full_ga": (("ga", "compute"), ("ga_mp", "compute")),
    "lora_plain": (("lora", "compute"), ("mp_lora", "fp32")),
    "lora_16bit": (("lora", "compute"), ("mp_lora", "compute")),
}


def records_batch() -> Batch:
    """The first built-in training records as a padded batch."""
    tokenizer = tiny_tokenizer()
    samples = [ALPACA_TEMPLATE.sample(record, tokenizer) for record in sample_records("train", N_RECORDS)]
    return collate(samples, Padding(CPU_16BIT_PAD_MULTIPLE))


def gradient(model: Transformer, batch: Batch, precision: Precision, scale: float = 1.0) -> Tensor:
    """The flattened fp32 gradient of the batch's mean loss times a scale, as computed in a precision."""
    model.zero_grad(set_to_none=True)
    use_products_of(CPU, precision.compute)
    with precision.autocast():
        loss = summed_loss(model, batch) / batch.n_targets
    (loss * scale).backward()
    return gradient_of(model)


def underflow(scales: Sequence[int], log: Log) -> Numbers:
    """The gradient's errors in fp16 and bf16, when fine-tuning begins and when the loss has fallen."""
    model, batch = load_tiny().train(), records_batch()
    log("gradients in 16 bit, start")
    start = underflow_of(model, batch, scales)
    take_steps(model, batch, N_STEPS, STEP_LR)
    log("gradients in 16 bit, later")
    return {"start": start, "later": underflow_of(model, batch, scales)}


def underflow_of(model: Transformer, batch: Batch, scales: Sequence[int]) -> Numbers:
    """Shares of elements that are 0 only in 16 bit, and that are not finite; the relative error."""
    exact = gradient(model, batch, Precision("cpu"))
    nonzero = exact != 0
    with torch.no_grad():
        loss = summed_loss(model, batch).item() / batch.n_targets
    numbers: Numbers = {"loss": loss, "gradient_norm": exact.norm().item()}
    for name, dtype in FORMATS.items():
        numbers[name] = {}
        for power in scales if name == "fp16" else (0,):
            scaled = gradient(model, batch, Precision("cpu", dtype), 2.0**power)
            finite = bool(scaled.isfinite().all())
            numbers[name][str(power)] = {
                "lost": ((scaled == 0) & nonzero).sum().item() / nonzero.sum().item(),
                "not_finite": 1 - scaled.isfinite().double().mean().item(),
                "error": relative_error(scaled / 2.0**power, exact) if finite else None,
            }
    return numbers


def take_steps(model: Transformer, batch: Batch, n_steps: int, lr: float, precision: Precision | None = None) -> None:
    """Take optimizer steps of the library on the same batch."""
    optimizer = make_optimizer(model.parameters(), TrainingConfig(lr=lr))
    step = TrainStep(model, optimizer, precision or Precision("cpu"), max_grad_norm=1.0)
    for _ in range(n_steps):
        step([batch])


def updates() -> dict[str, float]:
    """The share of weights that a step at the course's learning rate moves in fp32 but leaves unchanged in 16 bit.

    `fp16` and `bf16`: the update is added to the rounded weight, and the sum is rounded. `bf16_run`: a step of the
    library with `mp.trainable_weights=compute`, whose optimizer does the rounding.
    """
    batch = records_batch()

    def weights(dtype: torch.dtype, precision: Precision, n_steps: int) -> Tensor:
        model = load_tiny().train().to(dtype)
        take_steps(model, batch, n_steps, COURSE_LR, precision)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    fp32 = Precision("cpu")
    before, after = (weights(torch.float32, fp32, n) for n in (0, 1))
    moved, left = before != after, {}
    for name, dtype in FORMATS.items():
        rounded = before.to(dtype)
        stays = (rounded.float() + (after - before)).to(dtype) == rounded
        left[name] = stays[moved].double().mean().item()
    bf16 = FORMATS["bf16"]
    stays = weights(bf16, Precision("cpu", bf16, bf16, Storage(bf16)), 1) == before.to(bf16)
    return left | {"lr": COURSE_LR, "bf16_run": stays[moved].double().mean().item()}


def scaling() -> Numbers:
    """Run the library's GradScaler over steps of one weight, one of which overflows; report its scale's changes."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    scaler = Precision("cpu", torch.float16).scaler()
    scales, moved = [], []
    for step in range(1, OVERFLOW_AT + GROWTH_INTERVAL + 100):
        before = weight.detach().clone()
        scaler.scale(weight.sum() * (float("inf") if step == OVERFLOW_AT else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        scales.append(scaler.get_scale())
        moved.append(bool((weight != before).all()))
    changes = [step for step in range(2, len(scales) + 1) if scales[step - 1] != scales[step - 2]]
    return {
        "overflow_at": OVERFLOW_AT,
        "growth_interval": GROWTH_INTERVAL,
        "first": scales[0],
        "changes": [[step, scales[step - 1]] for step in changes],
        "steps_that_moved_nothing": [step for step, did in enumerate(moved, start=1) if not did],
    }


def planned_memory(model: str, n_tokens: int, combination: str, frozen: str) -> dict[str, float]:
    """The peaks of memory and of activations, MiB, in a step on a micro-batch of `n_tokens`, on a card with bf16.

    Samples have up to `LONGEST` tokens; half of each is trained on.
    """
    size = -(-n_tokens // LONGEST)
    keys = {"model": model, "optim": combination, "mp.frozen_weights": frozen, "training.micro_batch_size": size}
    config = composed_config("plan", [f"{key}={value}" for key, value in keys.items()], PlanConfig)
    samples = blank_samples([(n_tokens // size + 1, n_tokens // size // 2)] * size * config.ga.steps)
    use = fake_run(config, samples, Traits(on_cuda=True, has_bf16=True)).use
    return {"peak": use.peak_mib, "activation": use.max_mib["activation"]}


def memory_map(settings: Iterable[str], models: Iterable[str], tokens: Sequence[int]) -> Numbers:
    """Memory with mixed precision divided by that without: `peak` and `activation` by setting, model and tokens."""
    cells = list(product(settings, models, tokens))
    pairs = {(s, m, n): [(m, n, *run) for run in SETTINGS[s]] for s, m, n in cells}
    jobs = {run: run for pair in pairs.values() for run in pair}  # settings share some
    memory = dict(side_by_side(planned_memory, jobs))
    ratios: Numbers = {"tokens": list(tokens)}
    for key, (setting, model, n) in product(("peak", "activation"), cells):
        without, using = (memory[run][key] for run in pairs[setting, model, n])
        ratios.setdefault(key, {}).setdefault(setting, {}).setdefault(model, {})[str(n)] = using / without
    return ratios
