"""`python -m experiments`: all studies, each in a process of its own, and which of their claims hold."""

import json
import subprocess
import sys
import time
from pathlib import Path

from experiments import STUDIES
from experiments.study import OUTPUT, Options, parse_options, run_as_command
from llama_ft.cli import FAILED, USAGE_ERROR
from llama_ft.files import output_folder


def run_all(arguments: list[str]) -> int:
    """Run every study, and print a line for each.

    Returns:
        0 if every claim of every study holds, 1 if one fails, 2 if a study could not be finished.

    Raises:
        UserError: if an argument is wrong, or the folder cannot be written to.
    """
    options = parse_options(arguments, Options)
    with output_folder(str(options.output or OUTPUT), "experiments", "all") as folder:
        return _run_each(folder, "true" if options.quick else "false")


def _run_each(output: Path, quick: str) -> int:
    """Run the studies one after the other, each into a folder of its own."""
    lines, worst = [], 0
    for name in STUDIES:
        folder = output / name
        file = folder / f"{name}.json"
        earlier = file.stat().st_mtime_ns if file.is_file() else None
        print(f"{name}: {STUDIES[name]}", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", f"experiments.{name}", f"quick={quick}", f"output={folder}"]
        status = subprocess.run(command, check=False).returncode
        is_new = file.is_file() and file.stat().st_mtime_ns != earlier
        finished = status in (0, FAILED) and is_new
        worst = max(worst, status if finished else USAGE_ERROR)
        lines.append(f"{name}: {outcome(status, file if is_new else None)}, {time.monotonic() - began:.0f} s")
        print(flush=True)
    print("\n".join(lines))
    return worst


def outcome(status: int, file: Path | None) -> str:
    """How a study ended, by its exit status and the file of numbers that it left, if any."""
    if status not in (0, FAILED) or file is None:
        return f"not finished (exit status {status})"
    claims = json.loads(file.read_text(encoding="utf-8"))["claims"]
    return f"{sum(claim['holds'] for claim in claims)} of {len(claims)} claims hold"


if __name__ == "__main__":
    purpose = f"All studies ({', '.join(STUDIES)}), each in a process of its own, and which of their claims hold."
    sys.exit(run_as_command(run_all, "experiments", purpose, Options))
