"""`python -m llama_ft.generate`: text from a model, with or without a KV cache, with or without an adapter."""

import sys
import time

from rich.console import Console

from llama_ft import cli
from llama_ft.config import GenerateConfig

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
    from llama_ft.decoding.load import load_trained
    from llama_ft.measure.device import choose_device, compute_dtype

    device = choose_device(config.gpu)
    model = load_trained(config, device, compute_dtype(config.dtype, device, config.gpu), say)
    prompt = config.prompt if config.prompt is not None else prompt_text(str(config.instruction), config.input or "")
    began = time.monotonic()
    one = config.decoding.num_return_sequences == 1

    def on_text(text: str) -> None:
        print(text, end="", flush=True)

    (answers,) = generate(model, tokenizer, [prompt], config.decoding, config.kv_cache, *([on_text] if one else []))
    if one:
        print()
    for number, answer in enumerate(answers if not one else [], start=1):
        say(f"answer {number}, ended by {answer.finish}:")
        print(answer.text, flush=True)
    n_tokens, seconds = sum(answer.n_tokens for answer in answers), time.monotonic() - began
    cached = "with" if config.kv_cache else "without"
    say(f"{n_tokens} tokens in {seconds:.2f} s, {cached} a KV cache; ended by {answers[0].finish}")
    return 0


if __name__ == "__main__":
    cli.run_command(main, USAGE)
