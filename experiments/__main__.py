"""`python -m experiments`: all studies, each in a process of its own, and which of their claims hold."""

import json
import subprocess
import sys
import time
from pathlib import Path

from experiments import STUDIES
from experiments.study import OUTPUT, Options, parse_options, run_as_command
from llama_ft.cli import FAILED


def run_all(arguments: list[str]) -> int:
    """Run every study, and print a line for each.

    Returns:
        0 if every claim of every study holds, else 1.

    Raises:
        UserError: if an argument is wrong.
    """
    options = parse_options(arguments, Options)
    lines, all_hold = [], True
    for name in STUDIES:
        folder = (options.output or OUTPUT) / name
        file = folder / f"{name}.json"
        file.unlink(missing_ok=True)  # an earlier run's
        print(f"{name}: {STUDIES[name]}", flush=True)
        quick = "true" if options.quick else "false"
        began = time.monotonic()
        command = [sys.executable, "-m", f"experiments.{name}", f"quick={quick}", f"output={folder}"]
        status = subprocess.run(command, check=False).returncode
        all_hold &= status == 0
        lines.append(f"{name}: {outcome(status, file)}, {time.monotonic() - began:.0f} s")
        print(flush=True)
    print("\n".join(lines))
    return 0 if all_hold else FAILED


def outcome(status: int, file: Path) -> str:
    """How a study ended, by its exit status and the numbers it left."""
    if status not in (0, FAILED) or not file.is_file():
        return f"not finished (exit status {status})"
    claims = json.loads(file.read_text(encoding="utf-8"))["claims"]
    return f"{sum(claim['holds'] for claim in claims)} of {len(claims)} claims hold"


if __name__ == "__main__":
    purpose = f"All studies ({', '.join(STUDIES)}), each in a process of its own, and which of their claims hold."
    sys.exit(run_as_command(run_all, "experiments", purpose, Options))
