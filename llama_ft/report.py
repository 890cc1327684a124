"""`python -m llama_ft.report DIR`: the table and the picture of a sweep, finished or not."""

import argparse
from pathlib import Path

from rich.console import Console

from llama_ft import cli
from llama_ft.reporting.sweep import report_sweep


def main() -> int:
    """Report on the folder given."""
    parser = argparse.ArgumentParser(prog="python -m llama_ft.report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of a sweep, such as outputs/table2")
    report_sweep(parser.parse_args().folder, Console())
    return 0


if __name__ == "__main__":
    cli.run_command(main)
