"""Checks that a run's time grows only with its samples and layers: `python -m benchmarks.steady --output DIR`.

Real runs of the built-in model with random weights, one sample per step: of 100 to 800 samples, of 1 to 8 layers, and
one of 2,000 steps that goes twice over the same samples. A straight line is fitted to the times.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import correlation, linear_regression
from typing import Any

import torch

from llama_ft.device import device_name, versions
from llama_ft.files import write_json, write_text
from llama_ft.records.metrics import METRICS_FILE
from llama_ft.records.result import RESULT_FILE

COMMON = "gpu=cpu checkpoint=random training.micro_batch_size=1 training.save=false tracker=disabled"
SAMPLES, LAYERS, N_STEPS = (100, 200, 400, 800), (1, 2, 4, 8), 2000


def run(folder: Path, arguments: str) -> dict[str, Any]:
    """Do a run and return its result."""
    command = [sys.executable, "-m", "llama_ft.train", *COMMON.split(), *arguments.split(), f"hydra.run.dir={folder}"]
    subprocess.run(command, check=True)
    return dict(json.loads((folder / RESULT_FILE).read_text()))


def fitted(key: str, xs: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """The least-squares line through the times of runs."""
    slope, start = linear_regression(xs, seconds)
    r2 = correlation(xs, seconds) ** 2
    return {"key": key, "x": xs, "seconds": seconds, "seconds_per_unit": slope, "seconds_at_0": start, "r2": r2}


def two_epochs(folder: Path) -> dict[str, Any]:
    """Train twice on the same samples; return the times of both halves and the peak memory of each quarter."""
    run(folder, f"training.max_samples={N_STEPS // 2} training.epochs=2")
    steps = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    ends, memory = [step["time_s"] for step in steps], [step["memory_mib"] for step in steps]
    half = len(steps) // 2
    return {
        "steps": len(steps),
        "seconds": [ends[half - 1], ends[-1] - ends[half - 1]],
        "rss_mib_by_quarter": [max(memory[start : start + half // 2]) for start in range(0, len(steps), half // 2)],
    }


def markdown(found: dict[str, Any]) -> str:
    """The results as tables."""
    lines = ["| | seconds | a line's slope, s | R² |", "|---|---|---:|---:|"]
    for fit in (found["samples"], found["layers"]):
        points = ", ".join(f"{x}: {seconds:.2f}" for x, seconds in zip(fit["x"], fit["seconds"], strict=True))
        lines.append(f"| {fit['key']} | {points} | {fit['seconds_per_unit']:.4f} | {fit['r2']:.4f} |")
    twice = found["two_epochs"]
    first, second = twice["seconds"]
    rss = ", ".join(f"{mib:,.0f}" for mib in twice["rss_mib_by_quarter"])
    lines += ["", f"{twice['steps']:,} steps, twice over the same samples: {first:.1f} s, then {second:.1f} s."]
    lines += [f"Most resident memory in each quarter, MiB: {rss}."]
    about = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return "\n".join([*lines, "", f"{found['date']}, {found['device']}; {about}.", ""])


def main() -> None:
    """Do the runs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/steady"))
    folder: Path = parser.parse_args().output
    by_samples = [run(folder / f"samples-{n}", f"training.max_samples={n}")["runtime_s"] for n in SAMPLES]
    of_layers = "training.max_samples=200 model.n_layers="
    by_layers = [run(folder / f"layers-{n}", f"{of_layers}{n}")["runtime_s"] for n in LAYERS]
    found = {
        "date": date.today().isoformat(),
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "samples": fitted("training.max_samples", SAMPLES, by_samples),
        "layers": fitted("model.n_layers", LAYERS, by_layers),
        "two_epochs": two_epochs(folder / "two-epochs"),
    }
    write_json(folder / "steady.json", found)
    write_text(folder / "steady.md", markdown(found))
    print(markdown(found), f"Written: steady.json, steady.md in {folder}", sep="\n")


if __name__ == "__main__":
    main()
