"""`python -m llama_ft.data`: report on records, in tokens, before training on them."""

import sys
from functools import partial

from rich.console import Console

from llama_ft import cli
from llama_ft.config import DataCommandConfig
from llama_ft.files import explained, output_folder, write_text
from llama_ft.records import write_record
from llama_ft.reporting.data import data_markdown, print_data

USAGE = cli.Usage(
    "data",
    "Show records as a model will read them: how many tokens they have, how many of them are trained on, which records"
    " are too long, duplicated or without an answer, and three of them as text. No weights are read.",
    "[GROUP=CHOICE ...] [KEY=VALUE ...]",
    DataCommandConfig,
    (
        "data.path=records.jsonl",
        "data.path=questions.csv 'data.columns={instruction: question, output: answer}'",
        "model=from_checkpoint checkpoint=Llama-3.2-1B data=alpaca_200 output=outputs/alpaca",
        "model=llama2_7b tokenizer=FILE data.path=hub:ORG/NAME data.split=train",
    ),
)
JSON_FILE, TEXT_FILE = "data.json", "data.md"


def main() -> int:
    """Run the command."""
    config = cli.composed_config("data", sys.argv[1:], DataCommandConfig)
    console, errors = Console(), Console(stderr=True)
    log = partial(errors.print, highlight=False, markup=False, soft_wrap=True, style="dim")
    from llama_ft.data.inspection import inspect_data
    from llama_ft.data.tokenizer import load_tokenizer

    report = inspect_data(config, load_tokenizer(config), cli.command_line(), log)
    written = ""
    if config.output is not None:
        with output_folder(config.output, "data", config.data.name, (JSON_FILE, TEXT_FILE)) as folder:
            with explained(f"output={folder} cannot be written to"):
                write_text(folder / TEXT_FILE, data_markdown(report))
                write_record(report, folder / JSON_FILE)
            written = f"\nWritten: {TEXT_FILE}, {JSON_FILE} in {folder}"
    print_data(report, console)
    console.print(written, highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    cli.run_command(main, USAGE)
