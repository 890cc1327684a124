"""`python -m llama_ft`: which commands there are."""

import sys

from rich.console import Console

from llama_ft import __version__
from llama_ft.usage import print_commands


def main() -> int:
    """Print the commands, or the version."""
    if sys.argv[1:] == ["--version"]:
        print(f"llama_ft {__version__}")
        return 0
    print_commands(Console())
    return 0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main())
