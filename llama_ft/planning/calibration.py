"""A device's real speed: one efficiency for each compute dtype, from runs measured on it.

The efficiency is the share of the bound that the runs reached, or FLOP/s if no profile has the device's rates.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from llama_ft.config import GpuConfig, UserError, read_config
from llama_ft.data.dataset import load_data
from llama_ft.planning.gpu_traits import traits_of
from llama_ft.planning.operators import GIGA, bound_by_resource, flops_of, least_seconds
from llama_ft.planning.processes import side_by_side
from llama_ft.planning.run_costs import run_costs
from llama_ft.records.plan import PlannedTime, PlanRow
from llama_ft.records.result import CONFIG_FILE, RESULT_FILE, ran_on, results_below

Runs = dict[str, list[tuple[float, float]]]  # by dtype: each run's work, from `work_of`, and its seconds


def measured_runs(folder: Path, gpus: Sequence[GpuConfig]) -> tuple[Runs, str]:
    """The runs in a folder that calibrate a device, and its name; a UserError if there are none, or one is damaged."""
    if len(gpus) != 1:
        raise UserError("calibrate=DIR needs runs of one device: name its profile with gpu=NAME")
    gpu = gpus[0]
    if not folder.is_dir():
        raise UserError(f"calibrate={folder}: there is no such folder")
    results = {run: result for run, result in results_below(folder).items() if result.status == "ok"}
    if not results:
        raise UserError(f"calibrate={folder}: no run in it has completed (status ok in {RESULT_FILE})")
    here = {run: result for run, result in results.items() if ran_on(result, gpu.name, traits_of(gpu).on_cuda)}
    devices = sorted({str(result.device) for result in (here or results).values()})
    if not here:
        raise UserError(f"calibrate={folder}: its runs are of {', '.join(devices)}, but the plan is for gpu={gpu.name}")
    if len(devices) > 1:
        raise UserError(f"calibrate={folder}: its runs are of {' and '.join(devices)}: name the folder of one device")
    runs: Runs = {}
    for run, work in side_by_side(work_of, {run: (run, result.tokens, gpu) for run, result in here.items()}):
        runs.setdefault(str(here[run].compute_dtype), []).append((work, here[run].runtime_s or 0.0))
    return runs, devices[0]


def work_of(run_dir: Path, tokens: int | None, gpu: GpuConfig) -> float:
    """A run's bound on a device in seconds, or its FLOPs without a bound; a UserError if it cannot be planned."""
    config = read_config(run_dir / CONFIG_FILE)
    try:
        samples = load_data(config).samples
    except UserError as error:
        raise UserError(f"{run_dir} cannot be planned without its data: {error}") from error
    (costs,) = run_costs([config], samples, traits_of(gpu))
    if costs.tokens != tokens:
        raise UserError(f"{run_dir}: its data has {costs.tokens} tokens now, but had {tokens} when it was measured")
    bound_s = bound_by_resource(costs.operators, gpu)
    return least_seconds(bound_s) if bound_s else sum(flops_of(costs.operators).values())


def calibrate(rows: Sequence[PlanRow], runs: Runs, device: str) -> PlannedTime:
    """Replace the rows' bounds by estimates; a row gets no time if none of the runs computed in its dtype."""
    unknown: list[str] = []
    for row in rows:
        if row.flops:
            work, dtype = row.bound_runtime_s or sum(row.flops.values()), max(row.flops, key=row.flops.__getitem__)
            row.runtime_s = work / efficiency(runs[dtype]) if dtype in runs else None
            row.tokens_per_s = (row.tokens or 0) / row.runtime_s if row.runtime_s else None
            if dtype not in runs and dtype not in unknown:
                unknown.append(dtype)
    is_share = any(row.bound_runtime_s for row in rows)
    about = [_about(dtype, same, is_share) for dtype, same in runs.items()]
    about += [f"no time for {dtype}, in which no run computed" for dtype in unknown]
    return PlannedTime("calibrated", f"by runs on {device}: {'; '.join(about)}")


def efficiency(runs: Sequence[tuple[float, float]]) -> float:
    """The work per second of several runs together."""
    return sum(work for work, _ in runs) / sum(seconds for _, seconds in runs)


def errors(runs: Sequence[tuple[float, float]]) -> list[float]:
    """Each run's relative error if its time is predicted from all others."""
    others = [[*runs[:index], *runs[index + 1 :]] for index in range(len(runs))]
    return [work / efficiency(rest) / seconds - 1 for (work, seconds), rest in zip(runs, others, strict=True)]


def _about(dtype: str, runs: Sequence[tuple[float, float]], is_share: bool) -> str:
    """An efficiency and its error, in words."""
    reached = efficiency(runs)
    speed = f"{reached:.0%} of the bound" if is_share else f"{reached / GIGA:,.3g} GFLOP/s"
    if len(runs) == 1:
        return f"{dtype} at {speed} (from one run, so its error is not known)"
    off = errors(runs)
    error = f"off by {fmean(map(abs, off)):.0%} on average and {max(off, key=abs):+.0%} at worst"
    return f"{dtype} at {speed} ({len(runs)} runs, each predicted by the others: {error})"
