"""`python -m llama_ft.generate`: text from a model, with or without a KV cache, with or without an adapter."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from llama_ft import cli
from llama_ft.config import ComputeDtype, GenerateConfig

if TYPE_CHECKING:
    from llama_ft.model.transformer import Transformer

USAGE = cli.Usage(
    "generate",
    "Text from a model: to go on from a prompt, or to answer an instruction. Standard output has the text alone.",
    "prompt=TEXT | instruction=TEXT [input=TEXT] [GROUP=CHOICE ...] [KEY=VALUE ...]",
    GenerateConfig,
    (
        """'prompt="Once upon a time"' decoding=top_p""",
        """'instruction="Name the capital of France."' adapter=outputs/mine""",
        "prompt=Hello kv_cache=false decoding=beam",
    ),
    ("--help", "--version", "-sc install=bash"),
)


def main() -> int:
    """Generate what is asked for."""
    config = cli.composed_config("generate", sys.argv[1:], GenerateConfig)
    errors = Console(stderr=True)

    def say(line: str) -> None:
        errors.print(line, highlight=False, markup=False, soft_wrap=True, style="dim")

    from llama_ft.data.prompt import prompt_text
    from llama_ft.data.tokenizer import Tokenizer, check_vocabulary

    tokenizer = Tokenizer(config.tokenizer_file)
    check_vocabulary(tokenizer, config.tokenizer_file, config.model)
    from llama_ft.decoding.generate import generate

    model = load(config, say)
    prompt = config.prompt if config.prompt is not None else prompt_text(str(config.instruction), config.input or "")
    began = time.monotonic()
    one = config.decoding.num_return_sequences == 1

    def on_text(text: str) -> None:
        print(text, end="", flush=True)

    answers = generate(model, tokenizer, prompt, config.decoding, config.kv_cache, *([on_text] if one else []))
    if one:
        print()
    for number, answer in enumerate(answers if not one else [], start=1):
        say(f"answer {number}, ended by {answer.finish}:")
        print(answer.text, flush=True)
    n_tokens, seconds = sum(answer.n_tokens for answer in answers), time.monotonic() - began
    cached = "with" if config.kv_cache else "without"
    say(f"{n_tokens} tokens in {seconds:.2f} s, {cached} a KV cache; ended by {answers[0].finish}")
    return 0


def load(config: GenerateConfig, say: Callable[[str], None]) -> "Transformer":
    """The model that the config names, ready to generate."""
    import torch

    from llama_ft.measure.device import choose_device, has_bf16
    from llama_ft.model.weights import load_model
    from llama_ft.techniques.adapter import load_adapter

    device = choose_device(config.gpu)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    short = "bf16" if has_bf16(device, config.gpu) else "fp16"
    auto = "fp32" if device.type == "cpu" else short
    dtype = dtypes[auto if config.dtype is ComputeDtype.auto else config.dtype.name]
    model = load_model(config.model, str(config.checkpoint), device, dtype, say=say).eval()
    if config.adapter is not None:
        load_adapter(model, Path(config.adapter).expanduser(), config.merge)
    return model


if __name__ == "__main__":
    cli.run_command(main, USAGE)
