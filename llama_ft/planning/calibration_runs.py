"""The runs that a calibration learns from: which of a folder's they are, and what becomes of a plan's rows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ft.config import GpuConfig, TrainConfig, UserError
from llama_ft.data.dataset import load_data
from llama_ft.launch.child import read_config
from llama_ft.planning.calibration import (
    BYTES,
    NEW_BLOCKS,
    OPERATORS,
    Calibration,
    Measured,
    amounts,
    in_words,
    learn,
    measured,
)
from llama_ft.planning.gpu_traits import traits_of
from llama_ft.planning.predict import blank_samples, processes
from llama_ft.records.metrics import METRICS_FILE, read_metrics
from llama_ft.records.result import CONFIG_FILE, RESULT_FILE, read_result


@dataclass(frozen=True)
class MeasuredRun:
    """A run that ended well, as its folder has it."""

    folder: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class Learned:
    """What runs have taught of a device."""

    gpu: GpuConfig
    calibration: Calibration
    about: str  # for people


def learn_from(folder: Path, gpus: Sequence[GpuConfig]) -> Learned:
    """Learn from the runs in a folder, which has to be done before a plan is made, as it can fail.

    Raises:
        UserError: if the folder does not hold readable runs of the one device that is planned for.
    """
    if len(gpus) != 1:
        raise UserError("calibrate=DIR holds runs of one device: name its profile with gpu=NAME")
    gpu = gpus[0]
    runs, left_out = runs_of(folder, gpu)
    learned = learn(equations(runs, gpu), lambda resource: least_cost(resource, gpu))
    names = ", ".join(f"{run.folder.name} ({run.result['model']}, {run.result['runtime_s']:.3g} s)" for run in runs)
    return Learned(
        gpu, learned, f"learned from {names} on {runs[0].result['device']}: {in_figures(learned, gpu)}{left_out}"
    )


def calibrate(rows: Sequence[dict[str, Any]], learned: Learned) -> dict[str, str]:
    """Put estimates in place of the rows' bounds, which stay as `bound_runtime_s`; a row not told of gets no time.

    Returns:
        What `plan.json` says of its times: their kind, and a line for people.
    """
    refused: dict[str, list[str]] = {}
    for row in rows:
        row["bound_runtime_s"] = row["runtime_s"]
        if row["error"] is not None or row["flops"] is None:
            continue
        row["runtime_s"] = row["tokens_per_s"] = None
        figures = (row[key] for key in ("flops", "bytes_moved", "mapped_bytes", "bound_s", "operators"))
        try:
            seconds = learned.calibration.seconds(amounts(learned.gpu, *figures))
        except UserError as error:
            refused.setdefault(str(error), []).append(row["combination"])
            continue
        row |= {"runtime_s": seconds, "tokens_per_s": row["tokens"] / seconds}
    without = [f"; no time for {', '.join(which)}: {reason}" for reason, which in refused.items()]
    return {"kind": "calibrated", "about": learned.about + "".join(without)}


def least_cost(resource: str, gpu: GpuConfig) -> float:
    """The least that a unit of a resource can cost: a second of the bound takes a second at least."""
    return 0.0 if gpu.bandwidth_gb_s is None or resource == OPERATORS else 1.0


def in_figures(learned: Calibration, gpu: GpuConfig) -> str:
    """The costs, for people: efficiencies where the profile has rates, else rates."""
    parts = []
    for resource, cost in learned.cost.items():
        name = in_words(resource)
        if resource == OPERATORS:
            parts.append(f"{cost * 1e6:.3g} µs an operator")
        elif not cost:
            parts.append(f"{name} at no cost that could be seen")
        elif gpu.bandwidth_gb_s is not None:
            parts.append(f"{name} at {100 / cost:.0f} % of the profile's rate")
        elif resource in (BYTES, NEW_BLOCKS):
            parts.append(f"{name} at {1e-9 / cost:.3g} GB/s")
        else:
            parts.append(f"{name} at {1e-9 / cost:,.3g} GFLOP/s")
    return ", ".join(parts)


def runs_of(folder: Path, gpu: GpuConfig) -> tuple[list[MeasuredRun], str]:
    """The folder's runs, and those below it, that ended well on the planned device; and words for those left out.

    Raises:
        UserError: if there are none, or they are of several processors.
    """
    if not folder.is_dir():
        raise UserError(f"calibrate={folder}: there is no such folder")
    found = []
    for file in sorted(folder.rglob(RESULT_FILE)):
        # W&B keeps a copy with its own files.
        result = None if "wandb" in file.relative_to(folder).parts else read_result(file.parent)
        if result is not None and result["status"] == "ok":
            found.append(MeasuredRun(file.parent, result))
    if not found:
        raise UserError(f"calibrate={folder}: there is no run in it with status ok ({RESULT_FILE})")
    for run in found:
        if not all(isinstance(run.result[key], int | float) for key in ("runtime_s", "tokens", "samples")):
            raise UserError(f"{run.folder / RESULT_FILE} is damaged: a run with status ok has runtime_s and tokens")
    runs = [run for run in found if is_of(run.result, gpu)]
    devices = sorted({str(run.result["device"]) for run in runs})
    if not runs:
        there = ", ".join(sorted({str(run.result["device"]) for run in found}))
        raise UserError(f"calibrate={folder}: its runs are of {there}, and the plan is for gpu={gpu.name}")
    if len(devices) > 1:
        raise UserError(
            f"calibrate={folder}: its runs are of several devices, {' and '.join(devices)}: name a subfolder"
        )
    others = len(found) - len(runs)
    return runs, f"; {others} run{'s' if others > 1 else ''} of another device left out" if others else ""


def is_of(result: dict[str, Any], gpu: GpuConfig) -> bool:
    """Whether a run's device is the profile's: any processor for the CPU; a card by its model, as a100 of a100_40gb."""
    on_cuda = result["peak_memory_reserved_mib"] is not None
    if on_cuda != traits_of(gpu).on_cuda:
        return False
    card = re.sub(r"[^a-z0-9]", "", re.sub(r"_\d+gb$", "", gpu.name.lower()))
    return not on_cuda or card in re.sub(r"[^a-z0-9]", "", str(result["device"]).lower())


def equations(runs: Sequence[MeasuredRun], gpu: GpuConfig) -> list[Measured]:
    """The runs as equations, in their order.

    Raises:
        UserError: naming the folder, if a run's config, data or metrics cannot be read or are not the measured ones.
    """
    jobs = {}
    for number, run in enumerate(runs):
        config, lines = config_of(run.folder), checked_metrics(run.folder)
        samples = blank_samples(lengths_of(run, config))
        jobs[number] = (run.folder.name, config, samples, gpu, float(run.result["runtime_s"]), lines)
    found: dict[int, Measured] = {}
    with processes(len(jobs)) as run_jobs:
        for number, outcome in run_jobs(measured, jobs):
            if isinstance(outcome, UserError):
                raise outcome
            found[number] = outcome
    return [found[number] for number in sorted(found)]


def lengths_of(run: MeasuredRun, config: TrainConfig) -> list[tuple[int, int]]:
    """Tokens of each of the run's samples, and those of them that are the prompt's.

    Raises:
        UserError: if the data cannot be read, or is not what was measured.
    """
    try:
        samples = load_data(config, lambda line: None).samples
    except UserError as error:
        raise UserError(f"{run.folder}: the run's data is needed for its lengths: {error}") from error
    tokens = sum(len(sample) for sample in samples) * config.training.epochs
    if tokens != run.result["tokens"]:
        raise UserError(
            f"{run.folder}: its data has {tokens:,} tokens now, and {run.result['tokens']:,} when it was measured:"
            " put the measured data back, or leave the run out"
        )
    return [(len(sample), sample.n_prompt) for sample in samples]


def config_of(run_dir: Path) -> TrainConfig:
    """The run's config.

    Raises:
        UserError: naming the file, if it cannot be read.
    """
    file = run_dir / CONFIG_FILE
    try:
        return read_config(run_dir)
    except Exception as error:  # YAML's own errors, and whatever else a damaged file leads to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file} cannot be read: {reason}") from error


def checked_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, with times that grow.

    Raises:
        UserError: naming the file, if it is damaged.
    """
    lines = read_metrics(run_dir)
    times = [line.get("time_s") for line in lines]
    numbers = [0.0, *(time for time in times if isinstance(time, int | float))]
    if len(numbers) != len(lines) + 1 or sorted(numbers) != numbers:
        raise UserError(f"{run_dir / METRICS_FILE} is damaged: time_s does not grow from line to line; delete the file")
    return lines
