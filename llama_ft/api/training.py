"""Training: records, memory, fine-tuning."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from llama_ft.api.models import DtypeName
from llama_ft.config import OnBadRecord, TrainingConfig, UserError
from llama_ft.data.dataset import SAMPLE_DIR, Record, Sample, as_record, encode_record
from llama_ft.data.dataset import read_records as _read_records
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.device import DTYPES, memory_in_use_mib
from llama_ft.measure.memory import MemoryUse
from llama_ft.measure.worst_case import measure_worst_case
from llama_ft.model.storage import Dense
from llama_ft.model.transformer import Transformer
from llama_ft.records.metrics import StepMetrics
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.loop import Windows, train
from llama_ft.training.metrics import StepMeter
from llama_ft.training.position import Position
from llama_ft.training.setup import make_optimizer, make_schedule
from llama_ft.training.step import TrainStep


def read_records(file: str | Path | None = None) -> list[Record]:
    """The records of a JSON or JSONL file of {instruction, input, output}; None is the built-in training set.

    Raises:
        UserError: naming the record that is wrong.
    """
    return _read_records(Path(os.path.expanduser(file)) if file else SAMPLE_DIR / "train.jsonl", OnBadRecord.error)[0]


def encode(
    records: Iterable[Record | Mapping[str, str]], tokenizer: Tokenizer, max_length: int | None = None
) -> list[Sample]:
    """Tokenize records with Alpaca's template. The prompt is not trained on, the answer and EOS are.

    Args:
        records: each with `instruction`, `output` and, if it needs one, `input`.
        max_length: longer samples are truncated to so many tokens; those left with no answer are dropped.

    Raises:
        UserError: naming the record that lacks one of them.
    """
    samples = []
    for number, record in enumerate(records, 1):
        if not isinstance(record, Record):
            try:
                record = as_record(record)
            except ValueError as error:
                raise UserError(f"record {number}: {error}") from error
        sample = encode_record(record, tokenizer)
        sample = Sample(sample.tokens[:max_length], sample.n_prompt)
        if sample.n_targets > 0:
            samples.append(sample)
    return samples


def measure_memory(
    model: Transformer,
    samples: Sequence[Sample],
    *,
    micro_batch_size: int = 1,
    accumulation_steps: int = 1,
    precision: DtypeName = "fp32",
) -> MemoryUse:
    """Memory by category at the peak of training this model on these samples, in MiB of tensors. Needs no GPU.

    The worst case of any order of the data is run at learning rate 0; the model is as before afterwards.
    """
    step = _step(model, TrainingConfig(), precision)
    was_training = model.training
    model.train()
    data = Windows.over(samples, step, micro_batch_size, accumulation_steps)
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
    precision: DtypeName = "fp32",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
) -> Iterator[StepMetrics]:
    """Train the model's trainable parameters in place with AdamW; yields each optimizer step's numbers.

    Training goes on as the iterator is consumed. A step is yielded one step late: reading its loss delays no GPU.

    Args:
        lr: peak learning rate; it rises over `warmup_ratio` of the steps, then falls along a cosine.
        micro_batch_size: samples computed at once.
        accumulation_steps: micro-batches in an optimizer step.
        precision: fp32, or the 16-bit format of matrix products under autocast (fp16 with loss scaling).
        seed: of the data's order and of dropout.

    Raises:
        UserError: if a loss is not finite.
    """
    config = TrainingConfig(lr=lr, epochs=epochs, weight_decay=weight_decay, warmup_ratio=warmup_ratio, seed=seed)
    torch.manual_seed(seed)
    step = _step(model, config, precision, max_grad_norm)
    data = Windows.over(samples, step, micro_batch_size, accumulation_steps, seed)
    total_steps = data.steps_per_epoch * epochs
    schedule = make_schedule(step.optimizer, total_steps, warmup_ratio)
    meter = StepMeter(total_steps, lambda: memory_in_use_mib(step.device), step.scaler.is_enabled())
    for output in train(step, schedule, data, epochs, Position()):
        if (metrics := meter.record(output)) is not None:
            yield metrics
    if (metrics := meter.flush()) is not None:
        yield metrics


def _step(model: Transformer, config: TrainingConfig, precision: DtypeName, max_grad_norm: float = 1.0) -> TrainStep:
    weight = model.tok_embeddings.weight
    compute = Precision(weight.device.type, DTYPES[precision], frozen=Dense(weight.dtype))
    return TrainStep(model, make_optimizer(model.parameters(), config), compute, max_grad_norm)
