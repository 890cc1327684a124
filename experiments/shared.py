"""Code shared by several studies: the built-in model and data, gradients and their errors."""

import json
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

import llama_ft as lf
from llama_ft.config import ModelConfig, OnBadRecord
from llama_ft.config.presets import preset
from llama_ft.data.dataset import SAMPLE_DIR, read_records
from llama_ft.data.prompt import prompt_text
from llama_ft.data.records import Record, Sample
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.model.transformer import Transformer

ALPACA_LENGTHS = Path(__file__).parent / "alpaca_lengths.json"
CPU = torch.device("cpu")


def model_config(name: str) -> ModelConfig:
    """The sizes of `model=NAME`."""
    return preset("model", name, ModelConfig)


def load_tiny(device: torch.device = CPU) -> Transformer:
    """The built-in tiny model in fp32: random weights would soon repeat one token, and their texts prove little."""
    return lf.load("tiny", device=device)[0].eval()


def tiny_tokenizer() -> Tokenizer:
    """The tiny model's tokenizer."""
    return Tokenizer(model_config("tiny").builtin_dir / "tokenizer.model")


def sample_records(name: str, first: int) -> list[Record]:
    """The first built-in records, of `train` or `heldout`."""
    return read_records(SAMPLE_DIR / f"{name}.jsonl", OnBadRecord.error, first)[0]


def prompt_source() -> list[int]:
    """Token ids of a long text: the built-in held-out records as prompts, one after the other."""
    records = sample_records("heldout", 100)
    text = "\n".join(prompt_text(record.instruction, record.input) for record in records)
    return tiny_tokenizer().encode(text, bos=True)


def alpaca_samples() -> list[Sample]:
    """Samples as long as Alpaca's first 200, prompts and answers; their text is the built-in one."""
    lengths = json.loads(ALPACA_LENGTHS.read_text(encoding="utf-8"))["lengths"]
    text, starts = prompt_source(), accumulate((n_tokens for _, n_tokens in lengths), initial=0)
    return [
        Sample.after([text[index % len(text)] for index in range(start, start + n_tokens)], n_prompt)
        for start, (n_prompt, n_tokens) in zip(starts, lengths, strict=False)
    ]


def gradient_of(module: nn.Module) -> Tensor:
    """The flattened gradient of all parameters that have one."""
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


@torch.no_grad()
def relative_error(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the norm of the expected value."""
    return float((value - expected).norm() / expected.norm())


def largest_error(value: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number."""
    return ((value - expected).abs().max() / expected.abs().max()).item()
