"""The front door: what a notebook or a script uses, after `import llama_ft as lf`.

Plain functions over PyTorch modules. The commands are made of the same parts.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from llama_ft.config import (
    FROM_CHECKPOINT,
    TECHNIQUES,
    DataConfig,
    DecodingConfig,
    GpuConfig,
    ModelConfig,
    ModelSource,
    OnBadRecord,
    OptimConfig,
    PlanConfig,
    TrainingConfig,
    UserError,
)
from llama_ft.config.presets import preset
from llama_ft.data.dataset import SAMPLE_DIR, Record, Sample, encode_record
from llama_ft.data.dataset import read_records as _read_records
from llama_ft.data.prompt import prompt_text
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import generate
from llama_ft.device import memory_in_use_mib
from llama_ft.measure.memory import MemoryUse
from llama_ft.measure.worst_case import measure_worst_case
from llama_ft.model.folder import sizes_of
from llama_ft.model.storage import Dense
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model
from llama_ft.planning.predict import predict as _predict
from llama_ft.records.metrics import StepMetrics
from llama_ft.records.plan import PlanRow
from llama_ft.techniques.adapter import load_adapter as _load_adapter
from llama_ft.techniques.gradient_checkpointing import checkpoint_layers
from llama_ft.techniques.lora import add_lora
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.loop import train
from llama_ft.training.metrics import StepMeter, check_finite
from llama_ft.training.optimizer import make_optimizer, make_schedule
from llama_ft.training.position import Position
from llama_ft.training.saver import save_trained
from llama_ft.training.step import TrainStep
from llama_ft.training.windows import Windows

__all__ = [
    "MemoryUse",
    "PlanRow",
    "Record",
    "Sample",
    "StepMetrics",
    "Tokenizer",
    "Transformer",
    "UserError",
    "add_lora",
    "checkpoint_layers",
    "complete",
    "encode",
    "finetune",
    "load",
    "load_adapter",
    "measure_memory",
    "predict",
    "read_records",
    "save",
]

DtypeName = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    model: str | Path = "tiny",
    checkpoint: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: DtypeName = "fp32",
    device: str | torch.device | None = None,
    seed: int = 0,
) -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer.

    Args:
        model: a name of `conf/model`, such as `tiny` or `llama2_7b`; or a folder in Meta's, Hugging Face's or our
            format, whose sizes and weights are taken.
        checkpoint: the weights: `builtin` (of tiny), `random`, or a folder. None is the folder given as `model`, or
            builtin.
        tokenizer: a `tokenizer.model` or `tokenizer.json`; None is the one in the folder, or the built-in one.
        dtype: of the weights.
        device: None is the GPU where there is one, else the CPU.
        seed: of random weights.

    Raises:
        UserError: if the name is unknown, the weights are not this model's, or there is no tokenizer.
    """
    is_folder = Path(os.path.expanduser(model)).is_dir()
    if is_folder:
        folder = Path(os.path.expanduser(model))
        sizes, checkpoint = ModelConfig(**sizes_of(folder)), checkpoint or folder
    elif str(model) == FROM_CHECKPOINT:
        raise UserError("give the checkpoint's folder as the model: load(FOLDER)")
    else:
        sizes = preset("model", str(model), ModelConfig)
    named = [None if each is None else str(each) for each in (checkpoint, tokenizer)]
    source = ModelSource(sizes, *named)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_model(source.model, str(source.checkpoint), place, DTYPES[dtype], seed)
    return loaded, Tokenizer(source.tokenizer_file)


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
            if missing := {"instruction", "output"} - record.keys():
                raise UserError(f"record {number}: {min(missing)} is missing")
            record = Record(record["instruction"], record.get("input") or "", record["output"])
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

    Training goes on as the iterator is consumed: `for metrics in finetune(...)`, or `list(finetune(...))`. A step is
    yielded when the next one has been started, so that reading its loss does not make a GPU wait.

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
    meter, may_skip = StepMeter(total_steps, lambda: memory_in_use_mib(step.device)), step.scaler.is_enabled()
    for output in train(step, schedule, data, epochs, Position()):
        if (metrics := meter.record(output)) is not None:
            check_finite(metrics, may_skip)
            yield metrics
    if (metrics := meter.flush()) is not None:
        check_finite(metrics, may_skip)
        yield metrics


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    instruction: str | None = None,
    *,
    input: str = "",
    prompt: str | None = None,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> str:
    """The model's answer to an instruction, put into Alpaca's template, or its continuation of a prompt.

    Args:
        temperature: None takes the most probable token each time; a number samples.

    Raises:
        UserError: unless one of instruction and prompt is given, or if the prompt does not fit the model's context.
    """
    if (instruction is None) == (prompt is None):
        raise UserError("give either an instruction or a prompt")
    text = prompt if prompt is not None else prompt_text(str(instruction), input)
    sampling = {} if temperature is None else {"sample": True, "temperature": temperature, "top_p": top_p}
    config = DecodingConfig(max_new_tokens=max_new_tokens, stop=list(stop), seed=seed, **sampling)  # type: ignore[arg-type]
    return generate(model, tokenizer, [text], config)[0][0].text


def predict(
    model: str = "llama2_7b",
    gpu: str = "a100_40gb",
    *,
    techniques: Sequence[str] = (),
    lengths: Sequence[int] = (512,),
    micro_batch_size: int = 1,
    epochs: int = 1,
) -> PlanRow:
    """What fine-tuning would need on a card that need not be here, and how long it would take at best.

    Args:
        model: a name of `conf/model`.
        gpu: a name of `conf/gpu`.
        techniques: those that are on, such as `("mp", "lora")`, with their defaults.
        lengths: tokens of each sample.

    Raises:
        UserError: if a name is unknown, or the card cannot run such a combination.
    """
    if unknown := set(techniques) - {technique.name for technique in TECHNIQUES}:
        names = ", ".join(technique.name for technique in TECHNIQUES)
        raise UserError(f"{min(unknown)} is no technique: there are {names}")
    config = PlanConfig(
        model=preset("model", model, ModelConfig),
        optim=OptimConfig(**dict.fromkeys(techniques, True)),
        training=TrainingConfig(micro_batch_size=micro_batch_size, epochs=epochs),
        data=DataConfig("sample"),
        gpu=preset("gpu", gpu, GpuConfig),
    )
    row = _predict(config, [config.optim], [config.gpu], [(length, 1) for length in lengths])[0]
    if row.error is not None:
        raise UserError(row.error)
    return row


def save(model: Transformer, folder: str | Path) -> None:
    """Write what was trained into a folder: the LoRA adapter in PEFT's files, or else all weights.

    Raises:
        UserError: if it cannot be written.
    """
    place = Path(os.path.expanduser(folder))
    place.mkdir(parents=True, exist_ok=True)
    save_trained(model, place)


def load_adapter(model: Transformer, folder: str | Path, *, merge: bool = False) -> None:
    """Give a model the LoRA adapter in a folder: beside its weights, or merged into them.

    Raises:
        UserError: if there is no adapter, it is damaged, or of another model.
    """
    _load_adapter(model, Path(os.path.expanduser(folder)), merge)


def _step(model: Transformer, config: TrainingConfig, precision: DtypeName, max_grad_norm: float = 1.0) -> TrainStep:
    weight = model.tok_embeddings.weight
    compute = Precision(weight.device.type, DTYPES[precision], frozen=Dense(weight.dtype))
    return TrainStep(model, make_optimizer(model.parameters(), config), compute, max_grad_norm)
