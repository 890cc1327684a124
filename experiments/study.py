"""The frame of a study: what it can be told, what it claims, what it leaves, its exit status."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import date
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from experiments import STUDIES
from llama_ft.cli import FAILED, INTERRUPTED, USAGE_ERROR, command_line
from llama_ft.config import UserError
from llama_ft.config.checks import setting
from llama_ft.files import output_folder, whole_file

if TYPE_CHECKING:
    import torch

OUTPUT = Path("outputs") / "experiments"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Options:
    """What every study can be told."""

    quick: bool = setting(False, "less of what takes long: it shows that the study works, and is not to be quoted")
    output: Path | None = setting(None, f"folder of figure, table and numbers; null is {OUTPUT}/NAME")


@dataclass(frozen=True)
class Claim:
    """A sentence that numbers bear out, or not."""

    text: str
    """What is claimed, its threshold included."""
    holds: bool
    numbers: dict[str, float]
    """What was measured, by name."""

    def line(self) -> str:
        """For people: HOLDS or FAILS, the claim, the numbers."""
        found = ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in self.numbers.items())
        return f"{'HOLDS' if self.holds else 'FAILS'}: {self.text} ({found})"


Numbers = dict[str, Any]  # everything measured, in JSON's types


def the_cpu(options: Any) -> "torch.device":
    """Where studies run unless they say otherwise."""
    import torch

    return torch.device("cpu")


@dataclass(frozen=True)
class Study:
    """An experiment that can be run. Only `measure` runs anything: the rest follows from its numbers alone."""

    name: str
    options: type[Options]
    measure: Callable[[Any, Callable[[str], None]], Numbers]
    """Given the options, and a function that tells the user how far it is."""
    claims_of: Callable[[Numbers], list[Claim]]
    table_of: Callable[[Numbers], str]
    """The numbers for people, in Markdown."""
    draw: Callable[[Numbers, Path], None]
    """Draws the figure into a PNG file."""
    device: Callable[[Any], "torch.device"] = the_cpu
    """Given the options."""


Chosen = TypeVar("Chosen", bound=Options)


def parse_options(arguments: list[str], schema: type[Chosen]) -> Chosen:
    """The options, from KEY=VALUE arguments.

    Raises:
        UserError: naming the argument that is wrong, and what is allowed.
    """
    kinds, given = get_type_hints(schema), {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument}: an argument must be KEY=VALUE")
        if key in given:
            raise UserError(f"{key} is given twice")
        if key not in kinds:
            raise UserError(f"{key} is not a key: the options are {', '.join(kinds)}")
        given[key] = _converted(key, value, kinds[key])
    return schema(**given)


def _converted(key: str, value: str, kind: Any) -> Any:
    """The value as the type that the key has."""
    if kind is bool or (isinstance(kind, type) and issubclass(kind, Enum)):
        choices: dict[str, Any] = {"true": True, "false": False} if kind is bool else dict(kind.__members__)
        if value not in choices:
            raise UserError(f"{key}={value} is not allowed: it must be one of {', '.join(choices)}")
        return choices[value]
    if kind is int:
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"{key}={value} is not allowed: it must be a whole number, at least 1")
        return int(value)
    if not value:
        raise UserError(f"{key}= is not allowed: it must be a {'folder' if key == 'output' else 'file'}")
    return Path(os.path.expanduser(value))


def help_text(module: str, purpose: str, schema: type[Options]) -> str:
    """What `--help` prints."""
    rows, width = [], max(len(entry.name) for entry in fields(schema))
    for entry in fields(schema):
        default = entry.default.name if isinstance(entry.default, Enum) else json.dumps(entry.default)
        rows.append(f"  {entry.name:<{width}}  {default:<5}  {entry.metadata['meaning']}\n")
    exits = "Exit status: 0 if every claim holds, 1 if one fails, 2 if it could not be finished, 130 if interrupted."
    return f"{purpose}\n\n  python -m {module} [KEY=VALUE ...]\n\nKEY: default, meaning\n{''.join(rows)}\n{exits}"


def run_as_command(function: Callable[[list[str]], int], module: str, purpose: str, schema: type[Options]) -> int:
    """Run a command to its exit status: what the user can put right becomes a line on standard error."""
    arguments = sys.argv[1:]
    try:
        if {"--help", "-h"} & set(arguments):
            print(help_text(module, purpose, schema))
            return 0
        return function(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE_ERROR
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename2 or error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
    return USAGE_ERROR


def main(study: Study) -> int:
    """Be `python -m experiments.NAME`."""
    module, purpose = f"experiments.{study.name}", STUDIES[study.name]
    return run_as_command(lambda arguments: run(study, arguments), module, purpose, study.options)


def run(study: Study, arguments: list[str]) -> int:
    """Conduct the study, print what it claims, and leave NAME.json, NAME.md and NAME.png.

    Returns:
        0 if every claim holds, else 1.

    Raises:
        UserError: if an argument is wrong.
        OSError: if the folder cannot be written to.
    """
    options = parse_options(arguments, study.options)
    with output_folder(str(options.output or OUTPUT / study.name), "experiments", study.name) as folder:
        with one_thread():
            measured = study.measure(options, lambda line: print(line, file=sys.stderr, flush=True))
            numbers = json.loads(json.dumps(measured))  # as whoever reads the file has them
            claims, table = study.claims_of(numbers), study.table_of(numbers)
            record = _record(study, options, claims) | numbers
        file = folder / f"{study.name}.json"
        with (  # all three or none
            whole_file(file) as json_file,
            whole_file(file.with_suffix(".md")) as md_file,
            whole_file(file.with_suffix(".png")) as png_file,
        ):
            study.draw(numbers, png_file)
            md_file.write_text(table, encoding="utf-8")
            json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table)
    for claim in claims:
        print(claim.line())
    print(file.with_suffix(".png"))
    return 0 if all(claim.holds for claim in claims) else FAILED


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: tensors of a study's size gain little from more, and lose much where a core is taken."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _record(study: Study, options: Options, claims: Sequence[Claim]) -> dict[str, Any]:
    """What the JSON file holds beside the numbers: what they depend on, and what they say."""
    from llama_ft.device import device_name, versions
    from llama_ft.system import total_memory_bytes

    device = device_name(study.device(options))
    return {
        "schema_version": SCHEMA_VERSION,
        "study": study.name,
        "quick": options.quick,
        "command": command_line(),
        "date": date.today().isoformat(),
        "hardware": {"device": device, "cores": os.cpu_count(), "memory_mib": round(total_memory_bytes() / 2**20)},
        "versions": versions(),
        "claims": [{"text": claim.text, "holds": claim.holds, "numbers": claim.numbers} for claim in claims],
    }


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, its columns aligned for whoever reads it as it is."""
    cells = [list(titles), *([value if isinstance(value, str) else shown(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = ([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))] for row in cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in aligned)


def shown(value: Any) -> str:
    """A number for people: four digits of a small one, all before the point of a large one."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
