"""llama_ft beside its peers on the same fine-tuning work: speed, memory, and shares of what the machine can do.

    python -m benchmarks.peers --hf-python hf/bin/python --alt-python alt/bin/python
    python -m benchmarks.peers --rows ga_mp_lora --repeats 1 --samples 8

Each run is a fresh process; started again, the command goes on with those that are missing. README.md beside this file
says how to make the peers' environments, and what is measured. On Linux, on the CPU.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.compare import LABELS, MACHINE, MAX_OTHERS, OURS, Run, markdown, summary
from benchmarks.peers.limit import lengths
from benchmarks.peers.ours import CAN_PACK
from benchmarks.peers.workload import N_SAMPLES, ROWS, Row, machine_cpu_s
from llama_ft.device import device_name
from llama_ft.files import write_text
from llama_ft.launch.process import child_environment
from llama_ft.system import MIB, total_memory_bytes

CHECKOUT = Path(__file__).resolve().parents[2]
MODULES = {"transformers_trainer": "trainer", OURS: "ours", MACHINE: "limit"}  # else others
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
TRIES = 3  # of a run beside which others are busy


@dataclass(frozen=True)
class Planned:
    """A run to be done."""

    side: str
    row: str
    repeat: int
    python: str

    def is_done_by(self, run: Run, about: Run) -> bool:
        """Whether a line is this run's, with the same settings and code."""
        own: dict[str, object] = {"side": self.side, "row": self.row, "repeat": self.repeat}
        return all(run.get(key) == value for key, value in (about | own).items())


def main() -> int:
    """Do the runs that are missing; print the table, and leave it with its numbers."""
    told = _arguments()
    output, about = told.output.absolute(), {"samples": told.samples, "threads": told.threads, "code": code()}
    output.mkdir(parents=True, exist_ok=True)
    rows = [row for row in told.rows if CAN_PACK or not row.has("packed")]
    if rows != told.rows:
        print("rows with packing are left out: this llama_ft has none", flush=True)
    file, failed = output / "results.jsonl", 0
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    plan = list(planned(rows, told))
    for number, each in enumerate(plan, 1):
        title = f"{number}/{len(plan)} repeat {each.repeat} {each.row}, {each.side}"
        if any(each.is_done_by(run, about) for run in runs):
            print(f"{title}: done before", flush=True)
        elif (run := quiet_run(each, title, told)) is None:
            failed += 1
        else:
            runs.append(run | about | {"repeat": each.repeat, "date": date.today().isoformat()})
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(runs[-1]) + "\n")
    used = [run for run in runs if any(each.is_done_by(run, about) for each in plan)]
    report(rows, used, about, output)
    print(f"{failed} runs failed\n" if failed else "", f"Numbers: {output}", sep="")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-python", help="Python with transformers and peft; without it these are left out")
    parser.add_argument("--alt-python", help="Python with litgpt and torchtune; without it these are left out")
    parser.add_argument("--rows", nargs="+", type=Row, default=[Row(name) for name in ROWS], help=" ".join(ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=40, help=f"of a run, at most {N_SAMPLES}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for an idle machine before a run")
    parser.add_argument("--output", type=Path, default=Path("outputs/peers"), help="folder of the results")
    told = parser.parse_args()
    if not 1 <= told.samples <= N_SAMPLES or told.repeats < 1 or told.threads < 1:
        parser.error(f"samples must be 1 to {N_SAMPLES}, repeats and threads at least 1")
    return told


def planned(rows: list[Row], told: argparse.Namespace) -> Iterator[Planned]:
    """All runs, each once; the side that comes first is another one in each repeat."""
    pythons = {"transformers_loop": told.hf_python, "transformers_trainer": told.hf_python, OURS: sys.executable}
    sides = {side: python for side in LABELS if (python := pythons.get(side, told.alt_python))}
    seen = set()
    for repeat in range(1, told.repeats + 1):
        yield Planned(MACHINE, "baseline", repeat, sys.executable)
        first = (repeat - 1) % len(sides)
        for row in rows:
            for side in [*list(sides)[first:], *list(sides)[:first]]:
                each = Planned(side, row.name if side == OURS else row.of_peers, repeat, sides[side])
                if each not in seen:
                    yield each
                seen.add(each)


def quiet_run(each: Planned, title: str, told: argparse.Namespace) -> Run | None:
    """The quietest of up to three tries, which end with the first that others left alone; None if it fails."""
    best: Run | None = None
    for _ in range(TRIES):
        wait_until_idle(told.patience)
        command = [each.python, "-m", f"benchmarks.peers.{MODULES.get(each.side, 'others')}", each.side, each.row]
        done = subprocess.run(
            [*command, str(told.samples), str(told.threads)],
            cwd=CHECKOUT, env=environment(told.threads), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            print(f"{title}: FAILED: {(done.stderr.strip() or 'no message').splitlines()[-1]}", flush=True)
            return None
        run: Run = json.loads(done.stdout.splitlines()[-1])
        speed = f"{run['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in run else "rates measured"
        print(f"{title}: {speed}; others used {run['others_cpu']:.2f} processors", flush=True)
        if best is None or run["others_cpu"] < best["others_cpu"]:
            best = run
        if run["others_cpu"] <= MAX_OTHERS:
            break
    return best


def environment(threads: int) -> dict[str, str]:
    """A run's, for every side; modules are found from the checkout alone."""
    env = child_environment(on_cpu=True) | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    del env["PYTHONPATH"]
    return env


def wait_until_idle(patience_s: float) -> None:
    """Wait for a second in which hardly anything runs, so long at most."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        before = machine_cpu_s()
        time.sleep(1)
        if machine_cpu_s() - before < MAX_OTHERS:
            return


def report(rows: list[Row], runs: list[Run], about: dict[str, Any], output: Path) -> None:
    """Print and write what the runs say."""
    summaries = [summary(row, runs, lengths(about["samples"])) for row in rows]
    torch.set_num_threads(about["threads"])  # which the name says
    record = about | {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {run["side"]: run["versions"] for run in runs},
        "measured": [run for run in runs if run["side"] == MACHINE],
        "rows": summaries,
    }
    page = markdown(summaries)
    write_text(output / "results.json", json.dumps(record, indent=1) + "\n")
    write_text(output / "results.md", page)
    print(page)


def machine() -> dict[str, Any]:
    """What the numbers are of."""
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return {
        "device": device_name(torch.device("cpu")),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "processors": os.cpu_count(),
        "memory_mib": round(total_memory_bytes() / MIB),
    }


def code() -> str | None:
    """The commit that is measured, `-dirty` where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
