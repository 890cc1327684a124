"""The framework of a study: its options, claims, output files and exit status."""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any, TypeVar

from hydra.core.config_store import ConfigStore

from experiments import STUDIES
from llama_ft import cli
from llama_ft.config import TrackerConfig
from llama_ft.config.checks import setting
from llama_ft.files import output_folder, whole_file

if TYPE_CHECKING:
    import torch

OUTPUT = Path("outputs") / "experiments"
SCHEMA_VERSION = 1
EXIT_STATUS = "Exit status: 0 if every claim holds, 1 if one fails, 2 if it could not be finished, 130 if interrupted."

Numbers = dict[str, Any]  # everything measured, in JSON's types
Log = Callable[[str], None]  # reports progress
T = TypeVar("T", bound="Options")


@dataclass
class Options:
    """Options of every study."""

    quick: bool = setting(False, "do less of the slow parts: a check that the study works, not results to quote")
    output: str | None = setting(None, f"folder for figure, table and numbers; null is {OUTPUT}/NAME")
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def torch_device(self) -> "torch.device":
        """The device that the study runs on."""
        import torch

        return torch.device("cpu")


@dataclass(frozen=True)
class Claim:
    """A sentence that the numbers confirm, or not."""

    text: str
    """The claim, including its threshold."""
    holds: bool
    numbers: dict[str, float]
    """The measurements, by name."""

    def line(self) -> str:
        """A line with HOLDS or FAILS, the claim and the numbers."""
        numbers = ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in self.numbers.items())
        return f"{'HOLDS' if self.holds else 'FAILS'}: {self.text} ({numbers})"


@dataclass(frozen=True)
class Study:
    """An experiment. Only `measure` runs anything: all the rest follows from its numbers."""

    name: str
    options: type[Options]
    measure: Callable[[Any, Log], Numbers]
    """Given the options."""
    claims_of: Callable[[Numbers], list[Claim]]
    table_of: Callable[[Numbers], str]
    """Formats the numbers in Markdown."""
    draw: Callable[[Numbers, Path], None]
    """Draws the figure into a PNG file."""


@dataclass(frozen=True)
class StudyUsage(cli.Usage):
    """`--help` of a study, which is not a module of llama_ft."""

    study: str = ""

    @property
    def module(self) -> str:
        """The name after `python -m`."""
        return f"experiments.{self.study}".rstrip(".")


def main(study: Study) -> None:
    """Run `python -m experiments.NAME`."""
    run_command(lambda: conduct(study, sys.argv[1:]), STUDIES[study.name], study.options, study.name)


def run_command(function: Callable[[], int], purpose: str, options: type[Options], study: str = "") -> None:
    """Run `python -m experiments.STUDY`, or `python -m experiments`."""
    ConfigStore.instance().store(name="study_schema", node=options)  # for --help
    about, examples = f"{purpose} {EXIT_STATUS}", ("quick=true", "output=DIR tracker=wandb")
    cli.run_command(function, StudyUsage("study", about, "[KEY=VALUE ...]", options, examples, study=study))


def read_options(arguments: list[str], schema: type[T]) -> T:
    """The options, from KEY=VALUE arguments.

    Raises:
        UserError: names the key that is wrong.
    """
    ConfigStore.instance().store(name="study_schema", node=schema)  # for conf/study.yaml
    return cli.composed_config("study", arguments, schema)


def conduct(study: Study, arguments: list[str]) -> int:
    """Run the study, print its claims, and write NAME.json, NAME.md and NAME.png.

    Returns:
        0 if every claim holds, else 1.

    Raises:
        UserError: if an argument is wrong.
        OSError: if the folder cannot be written to.
    """
    import torch

    options = read_options(arguments, study.options)
    with output_folder(options.output or str(OUTPUT / study.name), "experiments", study.name) as folder:
        torch.set_num_threads(1)  # a study's tensors gain little from more threads, and lose much if a core is busy
        numbers = json.loads(json.dumps(study.measure(options, _log)))  # as read from the file
        claims, table = study.claims_of(numbers), study.table_of(numbers)
        record = _record(study, options, claims) | numbers
        files = [folder / f"{study.name}.{kind}" for kind in ("json", "md", "png")]
        with whole_file(files[0]) as json_file, whole_file(files[1]) as md_file, whole_file(files[2]) as png_file:
            study.draw(numbers, png_file)
            md_file.write_text(table, encoding="utf-8")
            json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _track(study.name, options.tracker, claims, files)
    print(table)
    for claim in claims:
        print(claim.line())
    print(files[-1])
    return 0 if all(claim.holds for claim in claims) else cli.FAILED


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _track(name: str, tracker: TrackerConfig, claims: Sequence[Claim], files: Sequence[Path]) -> None:
    """Report the study to the tracker."""
    from llama_ft.tracking import track_study

    numbers: dict[str, float] = {"claims": len(claims), "claims_held": sum(claim.holds for claim in claims)}
    for n, claim in enumerate(claims, start=1):
        numbers |= {f"claim_{n}/{key}": value for key, value in claim.numbers.items()}
    track_study(tracker, name, numbers, files, _log)


def _record(study: Study, options: Options, claims: Sequence[Claim]) -> dict[str, Any]:
    """The content of the JSON file besides the numbers: their conditions and the claims."""
    from llama_ft.device import device_name, versions
    from llama_ft.system import MIB, total_memory_bytes

    device, memory_mib = device_name(options.torch_device()), round(total_memory_bytes() / MIB)
    return {
        "schema_version": SCHEMA_VERSION,
        "study": study.name,
        "quick": options.quick,
        "command": cli.command_line(),
        "date": date.today().isoformat(),
        "hardware": {"device": device, "cores": os.cpu_count(), "memory_mib": memory_mib},
        "versions": versions(),
        "claims": [asdict(claim) for claim in claims],
    }


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, with aligned columns so that its source is readable."""
    cells = [list(titles), *([value if isinstance(value, str) else shown(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = ([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))] for row in cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in aligned)


def shown(value: Any) -> str:
    """Format a number: four digits of a small one, all digits before the point of a large one."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of the size with which values grow: the slope of a line through them on logarithmic axes."""
    return linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope
