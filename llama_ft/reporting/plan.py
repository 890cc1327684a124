"""What a plan is shown as, on the terminal and in files."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from llama_ft.files import write_text

PLAN_FILE = "plan.json"
FILES = (PLAN_FILE,)


def write_plan(plan: dict[str, Any], folder: Path) -> None:
    """Write all files of a plan."""
    write_text(folder / PLAN_FILE, json.dumps(plan, indent=1, allow_nan=False) + "\n")


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    for row in plan["rows"]:
        console.print(
            row["gpu"], row["combination"], row["peak_memory_mb"], row["required_mb"], row["fits"], row["runtime_s"]
        )
