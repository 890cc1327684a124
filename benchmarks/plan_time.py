"""How well two runs on this CPU predict the others: `python -m benchmarks.plan_time DIR [SWEEP]`.

DIR holds one folder a run, with its config.yaml, result.json and metrics.jsonl, and lengths.json: of each sample its
tokens, and those of them that are the prompt's. From SWEEP, a finished sweep, DIR is made first.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

from llama_ft.config import DeviceChoice, GpuConfig
from llama_ft.data.dataset import load_data
from llama_ft.files import write_text
from llama_ft.launch.child import read_config
from llama_ft.planning import calibration_runs
from llama_ft.planning.predict import combinations, predict
from llama_ft.records.metrics import METRICS_FILE
from llama_ft.records.result import CONFIG_FILE, RESULT_FILE, read_result

LEARNED_FROM = ("baseline", "mp")
LENGTHS_FILE = "lengths.json"


def keep(sweep: Path, folder: Path) -> None:
    """Copy what a sweep measured, and the lengths of its samples instead of its data."""
    runs = sorted(file.parent for file in sweep.glob(f"*/{RESULT_FILE}"))
    for run in runs:
        (folder / run.name).mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_FILE, RESULT_FILE, METRICS_FILE):
            shutil.copyfile(run / name, folder / run.name / name)
    samples = load_data(read_config(runs[0]), print).samples
    write_text(folder / LENGTHS_FILE, json.dumps([(len(sample), sample.n_prompt) for sample in samples]) + "\n")


def compare(folder: Path) -> tuple[list[tuple[str, float, float | None]], str]:
    """Of each combination its measured seconds and those that two of the runs predict; and what was learned."""
    lengths = [(n_tokens, n_prompt) for n_tokens, n_prompt in json.loads((folder / LENGTHS_FILE).read_text())]
    cpu = GpuConfig(name="cpu", device=DeviceChoice.cpu)
    config = replace(read_config(folder / LEARNED_FROM[0]), gpu=cpu)
    rows = predict(config, combinations(with_gc=False), [cpu], lengths)
    kept = mock.patch.object(calibration_runs, "lengths_of", return_value=lengths)
    with tempfile.TemporaryDirectory() as two, kept:
        for name in LEARNED_FROM:
            shutil.copytree(folder / name, Path(two) / name)
        about = calibration_runs.calibrate(rows, calibration_runs.learn_from(Path(two), [cpu]))["about"]
    seconds = {}
    for row in rows:
        result = read_result(folder / row["combination"])
        assert result is not None, f"{folder} has no run of {row['combination']}"
        seconds[row["combination"]] = result["runtime_s"]
    return [(row["combination"], seconds[row["combination"]], row["runtime_s"]) for row in rows], about


def main() -> None:
    """Print the table."""
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        keep(Path(sys.argv[2]), folder)
    rows, about = compare(folder)
    print("| combination | measured, s | predicted, s | error |\n|---|---:|---:|---:|")
    for name, measured, predicted in rows:
        used = " (learned from)" if name in LEARNED_FROM else ""
        error = "no time" if predicted is None else f"{predicted / measured - 1:+.1%}"
        print(f"| {name}{used} | {measured:.3g} | {'–' if predicted is None else f'{predicted:.3g}'} | {error} |")
    print(f"\n{about}")


if __name__ == "__main__":
    main()
