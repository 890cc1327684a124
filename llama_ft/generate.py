"""`python -m llama_ft.generate`: generate text from one prompt, from a file of prompts, or in a dialogue."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from llama_ft import cli
from llama_ft.config import GenerateConfig, path_of
from llama_ft.records.result import template_of_run
from llama_ft.reporting.progress import progress_bar
from llama_ft.system import Log, no_progress

if TYPE_CHECKING:
    from llama_ft.data.template import Template
    from llama_ft.data.tokenizer import Tokenizer
    from llama_ft.decoding.load import Models
    from llama_ft.decoding.prompts import Prompt
    from llama_ft.records.answers import Answer

USAGE = cli.Usage(
    "generate",
    "Generate text: continue a prompt or answer an instruction, one, many from a file, or one after the other in a"
    " dialogue. Only the text goes to standard output.",
    "prompt=TEXT | instruction=TEXT [input=TEXT] | prompts=FILE [output=FILE] | interactive=true"
    " [GROUP=CHOICE ...] [KEY=VALUE ...]",
    GenerateConfig,
    (
        """'prompt="Once upon a time"' decoding=top_p""",
        """'instruction="Name the capital of France."' adapter=outputs/mine compare=true""",
        "prompts=questions.jsonl output=answers.jsonl adapter=outputs/mine",
        "interactive=true adapter=outputs/mine",
        "prompt=Hello kv_cache=false decoding=beam",
    ),
)


def main() -> int:
    """Run the command."""
    config = cli.composed_config("generate", sys.argv[1:], GenerateConfig)
    errors = Console(stderr=True)
    log = partial(errors.print, highlight=False, markup=False, soft_wrap=True, style="dim")
    from llama_ft.data.template import choose_template
    from llama_ft.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config, log)
    template = choose_template(config.template, tokenizer, config.adapter or config.checkpoint)
    prompts = read_asked(config, tokenizer, template)
    from llama_ft.decoding.load import Models

    models = Models(config, tokenizer, log)
    if config.prompt is None:
        log(f"template: {template.name}")
    if config.prompts is not None:
        from llama_ft.decoding.prompt_file import answer_prompts

        # A bar only if the answers go into a file: printed answers show the progress themselves.
        progress = partial(progress_bar, errors) if config.output is not None else no_progress
        answer_prompts(config, prompts, models.dtype_name, models.load, progress, log)
    elif config.interactive:
        converse(config, models, tokenizer, template, log)
    else:
        from llama_ft.decoding.show import show_answers

        show_answers(prompts[0].text, models.load, config, log)
    return 0


def read_asked(config: GenerateConfig, tokenizer: "Tokenizer", template: "Template") -> "list[Prompt]":
    """Read and check the prompts known at the start, before a model is loaded, which may take long."""
    from llama_ft.decoding.prompts import Prompt, encode_in_context, prompt_of, read_prompts

    if config.prompts is not None:
        from llama_ft.decoding.prompt_file import answer_keys

        file = path_of(config.prompts)
        return read_prompts(file, answer_keys(config), tokenizer, config.model.max_seq_len, template, config.system)
    if config.interactive:
        return []
    record = {"prompt": config.prompt, "instruction": config.instruction, "input": config.input}
    prompt = Prompt(prompt_of(record, template, config.system), record)
    encode_in_context(prompt.text, tokenizer, config.model.max_seq_len)
    return [prompt]


def converse(config: GenerateConfig, models: "Models", tokenizer: "Tokenizer", template: "Template", log: Log) -> None:
    """Answer line after line, with the models kept loaded."""
    from llama_ft.data.template import choose_template
    from llama_ft.decoding.chat import chat, line_reader
    from llama_ft.decoding.show import show_answers

    adapters, answer = models.load_with_adapters()

    def use(folder: str) -> None:
        models.use(adapters, folder or None)
        log(f"with the adapter in {folder}" if folder else "without an adapter")
        trained = choose_template("auto", tokenizer, folder)
        if template_of_run(folder) and trained.text != template.text:
            log(f"it was trained with the template {trained.name}; the dialogue keeps {template.name}")

    def bare(prompts: Sequence[str], on_text: Callable[[str], None]) -> "list[list[Answer]]":
        used = adapters.used
        adapters.use(None)
        try:
            return answer(prompts, on_text)
        finally:
            adapters.use(used)

    base = models.load(True) if config.base is not None else bare

    def show(prompt: str) -> str:
        return show_answers(prompt, lambda is_base: base if is_base else answer, config, log)

    chat(show, use, line_reader(), log, template, config.system)


if __name__ == "__main__":
    cli.run_command(main, USAGE)
