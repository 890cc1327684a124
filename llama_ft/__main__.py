"""`python -m llama_ft`, also installed as `llama-ft`: list the commands, or run the named one."""

import importlib
import os
import sys
import textwrap
from functools import partial
from typing import Any

import hydra
from rich.console import Console

import llama_ft
from llama_ft import cli
from llama_ft.cli.usage import table
from llama_ft.config import SCHEMAS, config_dir


def main() -> int:
    """Run the command named by the first argument; without one, list the commands."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in SCHEMAS:
        command = command_module(first)
        del sys.argv[1]
        cli.run_command(command.main, command.USAGE)
    elif first in ("-sc", "--shell-completion"):
        complete()
    elif first in ("--help", "-h"):
        print_commands(Console())
    elif first == "--version":
        print(f"llama_ft {llama_ft.__version__}")
    else:
        print(f"error: {first} is not a command: it must be one of {', '.join(SCHEMAS)}", file=sys.stderr)
        return cli.USAGE_ERROR
    return 0


def command_module(name: str) -> Any:
    """Import a command's module; that of `data` is in the package llama_ft.data."""
    return importlib.import_module("llama_ft.data.__main__" if name == "data" else f"llama_ft.{name}")


def print_commands(console: Console) -> None:
    """Print the list of the commands."""
    lines = {name: str(command_module(name).__doc__).splitlines()[0] for name in SCHEMAS}
    rows = [(f"python -m llama_ft.{name}", line.partition(": ")[2].replace("`", "")) for name, line in lines.items()]
    wrapped = partial(textwrap.fill, width=console.width, break_on_hyphens=False)
    for text in (
        wrapped(str(llama_ft.__doc__).splitlines()[0]),
        "\nCommands, each with --help:",
        *table(rows, console.width),
        "",
        wrapped("llama-ft NAME does the same. In bash, this lets Tab complete its keys and choices:"),
        '  eval "$(llama-ft -sc install=bash)"',
    ):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def complete() -> None:
    """Complete by Hydra, which handles a single config: that of the command in `llama-ft COMMAND ARGUMENTS`.

    The shell code that `-sc install=bash` prints runs `llama-ft -sc query=bash` to complete the line in COMP_LINE.
    """
    program, _, rest = os.environ.get("COMP_LINE", "llama-ft train ").partition(" ")
    name, space, arguments = rest.lstrip().partition(" ")
    if not space:
        print("\n".join(SCHEMAS))
    elif name in SCHEMAS:
        *words, last = arguments.split(" ")
        overrides = [word for word in words if "=" in word or word.startswith("-")]  # report takes folders too
        os.environ["COMP_LINE"] = " ".join([program, *overrides, last])
        cli.register()
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(lambda config: None)()


if __name__ == "__main__":
    sys.exit(main())
