"""`python -m llama_ft`: which commands there are."""

import shlex
import sys

from rich.console import Console

from llama_ft import __version__
from llama_ft.cli.usage import commands, print_commands


def main() -> int:
    """Print the commands, or the version; 2 for anything else."""
    arguments = sys.argv[1:]
    if arguments in ([], ["--help"], ["-h"]):
        print_commands(Console())
        return 0
    if arguments == ["--version"]:
        print(f"llama_ft {__version__}")
        return 0
    if arguments[0] in commands():
        meant = shlex.join(arguments)
    else:
        meant = f"NAME, where NAME is one of {', '.join(commands())}"
    print(f"error: {arguments[0]} cannot follow python -m llama_ft: type python -m llama_ft.{meant}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
