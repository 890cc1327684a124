"""`python -m llama_ft.evaluate`: perplexity and exact match of a model, base against fine-tuned."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from llama_ft import cli
from llama_ft.config import EvaluateConfig, path_of
from llama_ft.files import Json, explained, output_folder, write_text
from llama_ft.records import write_record
from llama_ft.records.evaluation import EvaluatedText, Evaluation
from llama_ft.reporting.evaluation import evaluation_table
from llama_ft.reporting.progress import progress_bar
from llama_ft.reporting.table import markdown, print_table
from llama_ft.system import Log

if TYPE_CHECKING:
    from llama_ft.evaluation.measures import EvalInputs, Measured

USAGE = cli.Usage(
    "evaluate",
    "Measure the perplexity of responses and of a text, and the exact match of answers by task; with an adapter or base"
    " weights, compare two models in one table. data=sample evaluates on the records that training never sees.",
    "[GROUP=CHOICE ...] [KEY=VALUE ...]",
    EvaluateConfig,
    (
        "adapter=outputs/mine",
        "checkpoint=outputs/full base=builtin data.path=records.jsonl",
        "text=book.txt window=512 stride=256 exact_match=false",
    ),
)
JSON_FILE, TABLE_FILE, ANSWERS_FILE = "evaluate.json", "evaluate.md", "answers.jsonl"


def main() -> int:
    """Run the command."""
    config = cli.composed_config("evaluate", sys.argv[1:], EvaluateConfig)
    console, errors = Console(), Console(stderr=True)
    log = partial(errors.print, highlight=False, markup=False, soft_wrap=True, style="dim")
    inputs = load_inputs(config, log)
    from llama_ft import device as devices
    from llama_ft.decoding.load import storage_of
    from llama_ft.evaluation.measures import measure_models

    device = devices.use_device(devices.choose_device(config.gpu), config.gpu)
    log(devices.about_device(device, config.gpu))
    files = (JSON_FILE, TABLE_FILE, ANSWERS_FILE)
    with output_folder(config.output, "evaluations", config.model.name, files) as folder:
        with devices.out_of_memory_explained("lower batch_size, data.max_length, or for text=FILE window"):
            measured = measure_models(config, inputs, device, partial(progress_bar, errors), log)
        text = None
        if inputs.text is not None:
            size = inputs.text.n_bytes, len(inputs.text.tokens) - 1
            text = EvaluatedText(str(inputs.text.file), *size, config.window_tokens, config.stride_tokens)
        result = Evaluation(
            model=config.model.name,
            data=inputs.data.about,
            text=text,
            max_new_tokens=config.max_new_tokens,
            models=[model for model, _ in measured],
            majority=inputs.data.majority if config.exact_match else None,
            settings=config.to_dict(),
            device=devices.device_name(device),
            dtype=storage_of(config.dtype, device, config.gpu).name,
            versions=devices.versions(),
            command=cli.command_line(),
            template=inputs.template.name,
            ends=inputs.tokenizer.describe_ends(),
        )
        report(result, answer_lines(inputs, measured) if config.exact_match else "", folder, console)
    return 0


def load_inputs(config: EvaluateConfig, log: Log) -> "EvalInputs":
    """Load the records and the text to evaluate on; a UserError if that fails, or the tokenizer is not the model's."""
    from llama_ft.data.template import choose_template
    from llama_ft.data.tokenizer import load_tokenizer
    from llama_ft.evaluation.measures import EvalInputs
    from llama_ft.evaluation.perplexity import read_text
    from llama_ft.evaluation.records import load_records

    tokenizer = load_tokenizer(config, log)
    text = read_text(path_of(config.text), tokenizer) if config.text is not None else None
    template = choose_template(config.data.template, tokenizer, config.adapter or config.checkpoint)
    log(f"template: {template.name}")
    return EvalInputs(tokenizer, template, load_records(config, tokenizer, template, log), text)


def answer_lines(inputs: "EvalInputs", measured: "list[Measured]") -> str:
    """Content of `answers.jsonl`: each record with each model's raw answer and whether it is correct."""
    lines = []
    for index, record in enumerate(inputs.data.records):
        line: Json = {"instruction": record.instruction, "input": record.input, "task": record.task}
        line["expected"] = record.output
        for model, answers in measured:
            text = answers[index].text
            line |= {f"{model.role}_answer": text, f"{model.role}_correct": inputs.data.is_correct(index, text)}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def report(result: Evaluation, answers: str, folder: Path, console: Console) -> None:
    """Print the table; write the table, the numbers and the answers."""
    table = evaluation_table(result)
    names = [ANSWERS_FILE, TABLE_FILE, JSON_FILE] if answers else [TABLE_FILE, JSON_FILE]
    with explained(f"output={folder} cannot be written to"):
        if answers:
            write_text(folder / ANSWERS_FILE, answers)
        else:
            (folder / ANSWERS_FILE).unlink(missing_ok=True)  # an earlier evaluation's
        write_text(folder / TABLE_FILE, markdown(table))
        write_record(result, folder / JSON_FILE)  # last: if it exists, the others do
    print_table(table, console)
    console.print(f"\nWritten: {', '.join(names)} in {folder}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run_command(main, USAGE)
