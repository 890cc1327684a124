"""Prints answers to a prompt: only the text, or the answers of two models side by side."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_ft.config import GenerateConfig
from llama_ft.decoding.generate import GenerateFn, LoadFn
from llama_ft.records.answers import Answer
from llama_ft.system import Log, silent

BASE, FINE_TUNED = "base", "fine-tuned"
MIN_TABLE_WIDTH = 100  # characters; on narrower terminals the answers are printed one below the other


def show_answers(prompt: str, load: LoadFn, config: GenerateConfig, log: Log) -> str:
    """Print the answers to a prompt, a single one as it is generated; return the (fine-tuned) model's first answer."""
    if config.compare:
        compared = []
        for name in (BASE, FINE_TUNED):
            answers, summary = _ask(load(name == BASE), prompt, silent, config)
            log(f"{name}: {summary}")
            compared.append(answers)
        print_comparison(*compared)
    elif config.decoding.num_return_sequences == 1:
        with streamed_line() as write:
            answers, summary = _ask(load(False), prompt, write, config)
        log(summary)
    else:
        answers, summary = _ask(load(False), prompt, silent, config)
        for number, answer in enumerate(answers, start=1):
            log(f"answer {number}, ended by {answer.finish}:")
            print(answer.text, flush=True)
        log(summary)
    return answers[0].text


def _ask(
    answer: GenerateFn, prompt: str, on_text: Callable[[str], None], config: GenerateConfig
) -> tuple[list[Answer], str]:
    began = time.monotonic()
    (answers,) = answer([prompt], on_text)
    n_tokens, seconds = sum(answer.n_tokens for answer in answers), time.monotonic() - began
    cached = "with" if config.kv_cache else "without"
    return answers, f"{n_tokens} tokens in {seconds:.2f} s, {cached} a KV cache; ended by {answers[0].finish}"


@contextmanager
def streamed_line() -> Iterator[Callable[[str], None]]:
    """Print a line piece by piece, and end it even if generation breaks off."""
    is_begun = False

    def write(text: str) -> None:
        nonlocal is_begun
        is_begun = True
        print(text, end="", flush=True)

    try:
        yield write
        is_begun = True
    finally:
        if is_begun:
            print(flush=True)


def print_comparison(base: Sequence[Answer], fine_tuned: Sequence[Answer]) -> None:
    """Print both models' answers: side by side on a wide terminal, else one below the other, with their names."""
    pairs = [(first.text, second.text) for first, second in zip(base, fine_tuned, strict=True)]
    console = Console()
    if console.is_terminal and console.width >= MIN_TABLE_WIDTH:
        table = Table(expand=True, show_lines=True)
        for name in (BASE, FINE_TUNED):
            table.add_column(name, ratio=1, overflow="fold")
        for pair in pairs:
            table.add_row(*map(Text, pair))
        console.print(table)
    else:
        parts = [f"{name}:\n{text}\n" for pair in pairs for name, text in zip((BASE, FINE_TUNED), pair, strict=True)]
        print("\n".join(parts), end="", flush=True)
