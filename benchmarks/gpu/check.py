"""Code shared by the parts of the check: their setting and their output files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.study import Claim
from llama_ft.config import GpuConfig
from llama_ft.device import choose_device
from llama_ft.files import write_text
from llama_ft.kernels import use_kernels_of
from llama_ft.records.result import Result, read_result

CHECKOUT = Path(__file__).resolve().parents[2]
Numbers = dict[str, Any]  # in JSON's types
Outcome = tuple[Numbers, list[Claim]]
NOTHING: Outcome = ({}, [])
Status = Literal["done", "failed", "out of time", "not here"]


@dataclass(frozen=True)
class Setting:
    """A part's folder, device and inputs."""

    output: Path  # the part's own folder, for runs
    dry: bool  # use the CPU and the built-in model
    model: str
    data: str | None = None
    tokenizer: str | None = None

    @property
    def device(self) -> torch.device:
        """The device, set to use the same kernels as runs."""
        gpu = GpuConfig("cpu" if self.dry else "auto")
        device = torch.device("cpu") if self.dry else choose_device(gpu)
        use_kernels_of(device)
        return device

    def command(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
        """Run `python -m llama_ft.NAME ARGUMENTS` and return its output; a RuntimeError if the command itself fails."""
        variables = {**os.environ, "PYTHONPATH": str(CHECKOUT), **(environment or {})}
        if self.dry:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            [sys.executable, "-m", f"llama_ft.{name}", *arguments],
            cwd=CHECKOUT,
            env=variables,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode not in (0, 1):  # 1: one of its runs failed, as its result says
            raise RuntimeError(f"llama_ft.{name} {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def train(self, *arguments: str, folder: str) -> dict[str, Result]:
        """Train without a tracker; return the results of a run, or of a sweep's rows, by folder name."""
        target = self.output / folder
        key = "hydra.sweep.dir" if "-m" in arguments else "hydra.run.dir"
        self.command("train", *arguments, "tracker=disabled", "training.save=false", f"{key}={target}")
        folders = sorted(file.parent for file in target.rglob("result.json"))
        return {each.name: result for each in folders if (result := read_result(each))}


@dataclass(frozen=True)
class Part:
    """One part of the check, run in its own process."""

    name: str
    limit_s: int
    about: str
    run: Callable[[Setting], Outcome]
    needs_gpu: bool = False


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write(file: Path, asked: Numbers, status: Status, seconds: float, outcome: Outcome = NOTHING) -> None:
    """Write a part's JSON; `asked` describes its device and inputs."""
    numbers, claims = outcome
    listed = [{"text": claim.text, "holds": claim.holds, "numbers": claim.numbers} for claim in claims]
    content = {"part": file.stem, "asked": asked, "status": status, "seconds": round(seconds, 1)}
    content |= {"claims": listed, "numbers": numbers}
    write_text(file, json.dumps(content, indent=1, default=str) + "\n")
