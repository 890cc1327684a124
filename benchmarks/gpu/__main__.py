"""Check on this machine's GPU that the project's promises hold. Parts run in order of their value, 8 minutes at most.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --output DIR --model llama2_7b --data alpaca.json --tokenizer tokenizer.model
    python -m benchmarks.gpu --dry

Each part runs in its own process, under its own time limit, and writes a JSON file before the next begins. Started
again on the same device and model, the command continues with the parts that are not done. The exit status is 1 if a
claim fails.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import kernels, runs
from benchmarks.gpu.check import Numbers, Part, Setting, Status, write
from llama_ft.device import why_no_gpu
from llama_ft.files import new_folder
from llama_ft.system import MIB

PARTS = (
    Part("facts", 20, "versions, the card, what libraries take", kernels.facts),
    Part("attention", 45, "which kernel, and what a new length costs", kernels.attention),
    Part("losses", 20, "each line of metrics has its own step's loss", kernels.losses),
    Part("tracker", 40, "the tracker does not raise the peak", kernels.tracker),
    Part("tests", 240, "tests/test_gpu.py", runs.tests, needs_gpu=True),
    Part("plan", 240, "plan against measurement", runs.plan),
    Part("less_memory", 240, "the ladder of less memory, plan against measurement", runs.less_memory),
    Part("table2", 150, "Table 2 on the built-in model", runs.table2),
    Part("out_of_memory", 60, "running out of memory is known as such", runs.out_of_memory),
    Part("on_cpu", 30, "a run on the CPU leaves the GPU alone", runs.on_cpu),
    Part("decoding", 40, "a token's time with the KV cache", kernels.decoding),
    Part("resume", 60, "a resumed run ends like an undisturbed one", runs.resume),
)


def main() -> int:
    """Run all parts, or a single one in the process started for it."""
    arguments = _arguments()
    if arguments.part:
        return run_part(next(part for part in PARTS if part.name == arguments.part), arguments)
    output, console = arguments.output.absolute(), Console()
    output.mkdir(parents=True, exist_ok=True)
    began, asked = time.monotonic(), asked_of(arguments)
    for part in PARTS:
        file = output / f"{part.name}.json"
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if earlier.get("asked") == asked and earlier["status"] in ("done", "not here"):
            console.print(f"{part.name}: done before", highlight=False)
            continue
        file.unlink(missing_ok=True)
        left_s = arguments.minutes * 60 - (time.monotonic() - began)
        if part.needs_gpu and arguments.dry:
            write(file, asked, "not here", 0)
        elif left_s > 5:
            console.print(f"{part.name}: {part.about} ...", highlight=False)
            start_part(part, file, asked, min(left_s, 600 if arguments.dry else part.limit_s))
    return report(output, console)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check"), help="folder of the parts' files")
    parser.add_argument("--dry", action="store_true", help="check that every part runs: on the CPU, the built-in model")
    parser.add_argument("--minutes", type=float, default=8, help="time limit of all parts together")
    parser.add_argument("--model", help="for the part plan; default: the largest of three that should fit the card")
    parser.add_argument("--data", help="records for the part plan, such as alpaca_data.json; default: built-in ones")
    parser.add_argument("--tokenizer", help="for --data; default: the built-in one")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help="run only this part, in this process")
    arguments = parser.parse_args()
    if not arguments.dry and (reason := why_no_gpu()):
        parser.error(f"there is no GPU to check: {reason}; --dry runs on the CPU")
    return arguments


def asked_of(arguments: argparse.Namespace) -> Numbers:
    """The device and inputs of the parts: results for others do not apply."""
    device = "the CPU" if arguments.dry else torch.cuda.get_device_name(0)
    return {"device": device, "model": arguments.model, "data": arguments.data, "tokenizer": arguments.tokenizer}


def start_part(part: Part, file: Path, asked: Numbers, limit_s: float) -> None:
    """Run a part in its own process, and write its file if it did not."""
    began = time.monotonic()
    status: Status = "failed"
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--part", part.name]
    with (file.parent / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # also its commands, whose runs then stop by themselves
                process.wait()
    if not file.exists():
        write(file, asked, status, time.monotonic() - began)


def run_part(part: Part, arguments: argparse.Namespace) -> int:
    """Run a part in this process, and write its file."""
    output = arguments.output.absolute()
    folder = new_folder(str(output / part.name))  # not mixed up with runs of an earlier try
    setting = Setting(folder, arguments.dry, arguments.model or likely_model(), arguments.data, arguments.tokenizer)
    began, asked, file = time.monotonic(), asked_of(arguments), output / f"{part.name}.json"
    try:
        outcome = part.run(setting)
    except Exception:
        traceback.print_exc()  # into the part's log
        write(file, asked, "failed", time.monotonic() - began)
        return 1
    write(file, asked, "done", time.monotonic() - began, outcome)
    return 0


def likely_model() -> str:
    """The largest model whose LoRA runs in 16 bit fit the card."""
    memory_mib = torch.cuda.get_device_properties(0).total_memory / MIB if torch.cuda.is_available() else 0
    return "llama2_7b" if memory_mib > 20_000 else "tinyllama_1b" if memory_mib > 6000 else "tiny"


def report(output: Path, console: Console) -> int:
    """Print the claims; return 1 if one fails."""
    table = Table("Part", "Holds", "Claim", title="llama_ft on this machine", title_justify="left")
    failed = False
    for part in PARTS:
        file = output / f"{part.name}.json"
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"status": "out of time"}
        if content["status"] != "done":
            failed |= content["status"] != "not here"
            table.add_row(part.name, "–", f"{content['status']}; {part.about}")
        for claim in content.get("claims", []):
            failed |= not claim["holds"]
            numbers = ", ".join(f"{name} {value:,.4g}" for name, value in claim["numbers"].items())
            text = f"{claim['text']} ({numbers})" if numbers else claim["text"]
            table.add_row(part.name, "yes" if claim["holds"] else "NO", text)
    console.print(table)
    console.print(f"Numbers and logs: {output}", highlight=False, soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
