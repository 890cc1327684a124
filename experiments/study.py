"""The frame of a study: its options, what it claims, the files that it leaves, its exit status."""

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
Log = Callable[[str], None]  # tells the user how far it is
T = TypeVar("T", bound="Options")


@dataclass
class Options:
    """What every study can be told."""

    quick: bool = setting(False, "less of what takes long: it shows that the study works, and is not to be quoted")
    output: str | None = setting(None, f"folder of figure, table and numbers; null is {OUTPUT}/NAME")
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def torch_device(self) -> "torch.device":
        """Where the study runs."""
        import torch

        return torch.device("cpu")


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
        numbers = ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in self.numbers.items())
        return f"{'HOLDS' if self.holds else 'FAILS'}: {self.text} ({numbers})"


@dataclass(frozen=True)
class Study:
    """An experiment that can be run. Only `measure` runs anything: the rest follows from its numbers alone."""

    name: str
    options: type[Options]
    measure: Callable[[Any, Log], Numbers]
    """Given the options."""
    claims_of: Callable[[Numbers], list[Claim]]
    table_of: Callable[[Numbers], str]
    """The numbers for people, in Markdown."""
    draw: Callable[[Numbers, Path], None]
    """Draws the figure into a PNG file."""


@dataclass(frozen=True)
class StudyUsage(cli.Usage):
    """`--help` of a study, which is no module of llama_ft's."""

    study: str = ""

    @property
    def module(self) -> str:
        """What follows `python -m`."""
        return f"experiments.{self.study}".rstrip(".")


def main(study: Study) -> None:
    """Be `python -m experiments.NAME`."""
    run_command(lambda: conduct(study, sys.argv[1:]), STUDIES[study.name], study.options, study.name)


def run_command(function: Callable[[], int], purpose: str, options: type[Options], study: str = "") -> None:
    """Be `python -m experiments.STUDY`, or `python -m experiments`."""
    ConfigStore.instance().store(name="study_schema", node=options)  # for --help
    about, examples = f"{purpose} {EXIT_STATUS}", ("quick=true", "output=DIR tracker=wandb")
    cli.run_command(function, StudyUsage("study", about, "[KEY=VALUE ...]", options, examples, study=study))


def read_options(arguments: list[str], schema: type[T]) -> T:
    """The options, from KEY=VALUE arguments.

    Raises:
        UserError: naming the key that is wrong.
    """
    ConfigStore.instance().store(name="study_schema", node=schema)  # of conf/study.yaml
    return cli.composed_config("study", arguments, schema)


def conduct(study: Study, arguments: list[str]) -> int:
    """Run the study, print what it claims, and leave NAME.json, NAME.md and NAME.png.

    Returns:
        0 if every claim holds, else 1.

    Raises:
        UserError: if an argument is wrong.
        OSError: if the folder cannot be written to.
    """
    import torch

    options = read_options(arguments, study.options)
    with output_folder(options.output or str(OUTPUT / study.name), "experiments", study.name) as folder:
        torch.set_num_threads(1)  # a study's tensors gain little from more, and lose much where a core is taken
        numbers = json.loads(json.dumps(study.measure(options, _log)))  # as whoever reads the file has them
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
    """Report the study where runs are reported too."""
    from llama_ft.tracking import track_study

    numbers: dict[str, float] = {"claims": len(claims), "claims_held": sum(claim.holds for claim in claims)}
    for n, claim in enumerate(claims, start=1):
        numbers |= {f"claim_{n}/{key}": value for key, value in claim.numbers.items()}
    track_study(tracker, name, numbers, files, _log)


def _record(study: Study, options: Options, claims: Sequence[Claim]) -> dict[str, Any]:
    """What the JSON file holds beside the numbers: what they depend on, and what they say."""
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
    """A table in Markdown, its columns aligned for whoever reads it as it is."""
    cells = [list(titles), *([value if isinstance(value, str) else shown(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = ([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))] for row in cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in aligned)


def shown(value: Any) -> str:
    """A number for people: four digits of a small one, all before the point of a large one."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of the size with which the values grow: the slope of a line through them on logarithmic axes."""
    return linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope
