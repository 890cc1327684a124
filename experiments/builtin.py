"""What studies take from the built-in model and data."""

import json

import torch
from omegaconf import OmegaConf

from llama_ft.config import PACKAGE_DIR, ModelConfig, config_dir
from llama_ft.data.prompt import prompt_text
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model

CHECKPOINT = "builtin"
CPU = torch.device("cpu")


def model_config(name: str) -> ModelConfig:
    """The sizes of `model=NAME`."""
    return ModelConfig(**OmegaConf.load(config_dir() / "model" / f"{name}.yaml"))  # type: ignore[arg-type]


def load_tiny(device: torch.device = CPU) -> Transformer:
    """The tiny model as it ships, fp32: random weights would soon repeat one token, and their texts prove little."""
    return load_model(model_config("tiny"), CHECKPOINT, device, torch.float32).eval()


def tiny_tokenizer() -> Tokenizer:
    """The tiny model's tokenizer."""
    return Tokenizer(PACKAGE_DIR / "model" / "tiny" / "tokenizer.model")


def prompt_source() -> list[int]:
    """Token ids of a long text: the built-in held-out records as prompts, one after the other."""
    lines = (PACKAGE_DIR / "data" / "sample" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[:100]]
    text = "\n".join(prompt_text(record["instruction"], record["input"]) for record in records)
    return tiny_tokenizer().encode(text, bos=True)
