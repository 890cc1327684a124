"""Training: records, memory, fine-tuning."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from llama_ft.api.models import DtypeName
from llama_ft.config import OnBadRecord, Optimizer, Schedule, TrainingConfig, TrainOn, UserError, path_of
from llama_ft.config.checks import check
from llama_ft.config.techniques import GradientAccumulationConfig
from llama_ft.data.dataset import SAMPLE_DIR
from llama_ft.data.dataset import read_records as _read_records
from llama_ft.data.records import Record, Sample, as_record
from llama_ft.data.template import choose_template
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.device import DTYPES
from llama_ft.evaluation.perplexity import perplexity as _perplexity
from llama_ft.kernels import use_training_kernels
from llama_ft.measure.memory import MemoryUse
from llama_ft.measure.worst_case import measure_worst_case
from llama_ft.model.four_bit import is_in_4_bits
from llama_ft.model.transformer import Transformer
from llama_ft.records.evaluation import Perplexity
from llama_ft.records.metrics import StepMetrics
from llama_ft.techniques.lora import lora_layers
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.loop import Windows, train
from llama_ft.training.metrics import StepMeter
from llama_ft.training.position import Position
from llama_ft.training.setup import make_schedule, make_step
from llama_ft.training.step import TrainStep

ScheduleName = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"]


def read_records(file: str | Path | None = None) -> list[Record]:
    """Read the records of a file, a folder or hub:ORG/NAME, as `data.path` does; None is the built-in training set.

    Raises:
        UserError: if a record is wrong; it names the record.
    """
    return _read_records(path_of(file) if file else SAMPLE_DIR / "train.jsonl", OnBadRecord.error)[0]


def encode(
    records: Iterable[Record | Mapping[str, object]],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    *,
    template: str = "auto",
    train_on: Literal["assistant", "all", "last"] = "assistant",
) -> list[Sample]:
    """Tokenize records. The answer and its end are trained on, the prompt is not.

    Args:
        records: each with `instruction`, `output` and, if it needs one, `input`; with `messages` of role and content;
            or with `prompt` and `completion`.
        max_length: longer samples are truncated to this many tokens; those left with no answer are dropped.
        template: `chat` (the tokenizer's own), `alpaca`, `plain` or the name of a file in Jinja; `auto` is chat if
            there is one, else alpaca.
        train_on: the assistant's turns, all tokens, or only the last answer.

    Raises:
        UserError: naming a record that lacks one of the keys, or that the template does not accept.
    """
    chosen, samples = choose_template(template, tokenizer), []
    for number, record in enumerate(records, 1):
        try:
            whole = record if isinstance(record, Record) else as_record(record)
            sample = chosen.sample(whole, tokenizer, TrainOn[train_on]).cut(max_length)
        except ValueError as error:
            raise UserError(f"record {number}: {error}") from error
        if sample.n_targets > 0:
            samples.append(sample)
    return samples


def measure_memory(
    model: Transformer,
    samples: Sequence[Sample],
    *,
    micro_batch_size: int = 1,
    accumulation_steps: int = 1,
    packing: int | None = None,
    precision: DtypeName = "fp32",
    optimizer: OptimizerName = "adamw",
    momentum: float = 0.9,
    optimizer_in_backward: bool = False,
) -> MemoryUse:
    """Memory by category at the peak of training this model on these samples, in MiB of tensors. Needs no GPU.

    The worst case of any order of the data is run at learning rate 0; the model is unchanged afterwards.

    Raises:
        UserError: if a value is not allowed, or the samples do not suit the model.
    """
    config = _config(locals() | {"max_grad_norm": math.inf})  # which takes as much memory as any
    step, data = _step_and_windows(model, samples, config, accumulation_steps, precision)
    was_training = model.training
    model.train()
    use = measure_worst_case(step, data)
    model.train(was_training)
    return use


def finetune(
    model: Transformer,
    samples: Sequence[Sample],
    *,
    lr: float = 2e-4,
    epochs: int = 1,
    micro_batch_size: int = 1,
    accumulation_steps: int = 1,
    packing: int | None = None,
    precision: DtypeName = "fp32",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    schedule: ScheduleName = "cosine",
    optimizer: OptimizerName = "adamw",
    momentum: float = 0.9,
    optimizer_in_backward: bool = False,
) -> Iterator[StepMetrics]:
    """Train the model's trainable parameters in place; yield each optimizer step's metrics, one step late.

    Training continues as the iterator is consumed. Losses are read late so that the GPU does not wait.

    Args:
        lr: peak learning rate, after a warm-up over `warmup_ratio` of the steps; then `schedule` lets it fall along a
            cosine or a line to 0, or keeps it.
        micro_batch_size: samples in a micro-batch.
        accumulation_steps: micro-batches in an optimizer step.
        packing: put the samples of an optimizer step end to end, up to this many tokens, and compute them at once.
        precision: fp32, or the 16-bit format of matrix products under autocast (fp16 with loss scaling).
        seed: of the data's order and of the techniques' random numbers.
        optimizer: as `training.optimizer`; sgd needs a far larger `lr`, and keeps no state if its `momentum` is 0.
        optimizer_in_backward: as the key of `training`; it needs `max_grad_norm=math.inf`.

    Raises:
        UserError: if a value is not allowed, the samples do not suit the model, or a loss is not finite.
    """
    config = _config(locals())
    torch.manual_seed(seed)
    yield from _steps(*_step_and_windows(model, samples, config, accumulation_steps, precision), config)


def perplexity(model: Transformer, samples: Sequence[Sample], *, batch_size: int = 8) -> Perplexity:
    """Perplexity of the samples' target tokens, and their mean loss (`nll`), without dropout and in the weights' dtype.

    Between the steps of `finetune` it changes nothing but their time.

    Raises:
        UserError: if there are no samples, or the loss is not a number.
    """
    if not samples:
        raise UserError("there are no samples to evaluate")
    was_training = model.training
    model.eval()
    result = _perplexity(model, samples, batch_size)
    model.train(was_training)
    return result


def _config(given: Mapping[str, Any]) -> TrainingConfig:
    """A config from those arguments that are keys of `training`; a UserError if one is not allowed."""
    settings = {key: value for key, value in given.items() if key in TrainingConfig.__dataclass_fields__}
    for key, kind in {"schedule": Schedule, "optimizer": Optimizer}.items():
        if key in settings:
            check(settings[key] in kind.__members__, key, settings[key], f"one of {', '.join(kind.__members__)}")
            settings[key] = kind[settings[key]]
    return TrainingConfig(**settings)


def _steps(step: TrainStep, data: Windows, config: TrainingConfig) -> Iterator[StepMetrics]:
    total_steps = data.steps_per_epoch * config.epochs
    schedule = make_schedule(step.optimizer, total_steps, config)
    meter = StepMeter(total_steps, step.device, step.scaler.is_enabled())
    read = map(meter.record, train(step, schedule, data, config.epochs, Position()))
    yield from filter(None, chain(read, map(StepMeter.flush, [meter])))


def _step_and_windows(
    model: Transformer, samples: Sequence[Sample], config: TrainingConfig, accumulation_steps: int, precision: DtypeName
) -> tuple[TrainStep, Windows]:
    GradientAccumulationConfig(accumulation_steps)  # checks it
    longest, context = max(map(len, samples), default=0), model.config.max_seq_len
    if not samples:
        raise UserError("there are no samples to train on")
    if longest > context:
        cut = f"encode(records, tokenizer, max_length={context})"
        raise UserError(f"a sample has {longest} tokens, and the model's context is {context}: {cut} truncates")
    if is_in_4_bits(model) and not lora_layers(model):
        raise UserError("the model's weights are in 4 bits, which cannot be trained: call lf.add_lora(model) first")
    use_training_kernels(device := model.tok_embeddings.weight.device)
    if precision not in DTYPES:
        raise UserError(f"{precision} is not a dtype: it must be one of {', '.join(DTYPES)}")
    compute = Precision(device.type, DTYPES[precision])
    config.check_on(compute.device_type, accumulation_steps, precision == "fp16")
    step = make_step(model, config, compute)
    return step, Windows.over(samples, step, config, accumulation_steps)
