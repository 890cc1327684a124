"""`python -m experiments`: run all studies, each in its own process, and report which of their claims hold."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from experiments import STUDIES
from experiments.study import OUTPUT, Options, read_options, run_command
from llama_ft.cli import FAILED, USAGE_ERROR
from llama_ft.files import output_folder


def run_all(arguments: list[str]) -> int:
    """Run every study with the same arguments, each in its own folder, and print a line for each.

    Returns:
        0 if every claim of every study holds, 1 if one fails, 2 if a study did not finish.

    Raises:
        UserError: if an argument is wrong, or the folder cannot be written to.
    """
    options, lines, worst = read_options(arguments, Options), [], 0
    # Set by our own command, so it does not mean that the user wants tracebacks.
    variables = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    with output_folder(options.output or str(OUTPUT), "experiments", "all") as folder:
        for name in STUDIES:
            file = folder / name / f"{name}.json"
            earlier, began = written_at(file), time.monotonic()
            print(f"{name}: {STUDIES[name]}", flush=True)
            command = [sys.executable, "-m", f"experiments.{name}", *arguments, f'output="{file.parent}"']
            status = subprocess.run(command, check=False, env=variables).returncode
            finished = status in (0, FAILED) and written_at(file) != earlier
            worst = max(worst, status if finished else USAGE_ERROR)
            outcome = claims_held(file) if finished else f"not finished (exit status {status})"
            lines.append(f"{name}: {outcome}, {time.monotonic() - began:.0f} s")
            print(flush=True)
    print("\n".join(lines))
    return worst


def written_at(file: Path) -> int | None:
    """The time at which a file was written; None if it does not exist."""
    return file.stat().st_mtime_ns if file.is_file() else None


def claims_held(file: Path) -> str:
    """Say how many of a study's claims hold."""
    claims = json.loads(file.read_text(encoding="utf-8"))["claims"]
    return f"{sum(claim['holds'] for claim in claims)} of {len(claims)} claims hold"


if __name__ == "__main__":
    purpose = f"Run all studies ({', '.join(STUDIES)}), each in its own process, and report which claims hold."
    run_command(lambda: run_all(sys.argv[1:]), purpose, Options)
