"""Compare llama_ft with its peers on the same fine-tuning work: speed, memory, and shares of the machine's limit.

    python -m benchmarks.peers --hf-python hf/bin/python --alt-python alt/bin/python
    python -m benchmarks.peers --rows ga_mp_lora --repeats 1 --samples 8

Each run is a new process; started again, the command continues with the missing runs. README.md next to this file
explains how to create the peers' environments, and what is measured. On Linux, on the CPU.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.peers.compare import LABELS, MACHINE, MAX_OTHERS, Run, markdown, summary
from benchmarks.peers.limit import lengths
from benchmarks.peers.workload import N_SAMPLES, OURS, ROWS, Row
from llama_ft.device import device_name
from llama_ft.files import write_json, write_text
from llama_ft.launch.process import child_environment
from llama_ft.system import MIB, total_memory_bytes

CHECKOUT = Path(__file__).resolve().parents[2]
MODULES = {"transformers_trainer": "trainer", OURS: "ours", MACHINE: "limit"}  # else others
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
TRIES = 3  # of a run while other processes are busy


class Planned(NamedTuple):
    """A run to do."""

    side: str
    row: Row
    repeat: int


def main() -> int:
    """Do the missing runs; print and write the table and its numbers."""
    args = _arguments()
    about = {"samples": args.samples, "threads": args.threads, "code": code()}
    args.output.mkdir(parents=True, exist_ok=True)
    file, used = args.output / "results.jsonl", list[Run]()
    earlier = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    plan = list(planned(args))
    for number, each in enumerate(plan, 1):
        title, own = f"{number}/{len(plan)} repeat {each.repeat} {each.row}, {each.side}", about | each._asdict()
        if run := next((run for run in earlier if own.items() <= run.items()), None):
            print(f"{title}: done before", flush=True)
        elif measured := quiet_run(each, title, args):
            run = measured | own | {"date": date.today().isoformat()}
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(run) + "\n")
        used += [run] if run else []
    report(args, used, about)
    failed = len(plan) - len(used)
    print(f"{failed} runs failed\n" if failed else "", f"Numbers: {args.output}", sep="")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-python", help="Python with transformers and peft; without it these are left out")
    parser.add_argument("--alt-python", help="Python with litgpt and torchtune; without it these are left out")
    parser.add_argument("--rows", nargs="+", type=Row, choices=ROWS, default=ROWS, metavar="ROW", help=" ".join(ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=40, help=f"per run, at most {N_SAMPLES}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/peers"), help="folder of the results")
    args = parser.parse_args()
    if not 1 <= args.samples <= N_SAMPLES or args.repeats < 1 or args.threads < 1:
        parser.error(f"samples must be 1 to {N_SAMPLES}, repeats and threads at least 1")
    return args


def python_of(side: str, args: argparse.Namespace) -> str | None:
    """The Python interpreter of a side; None if the side is left out."""
    if side in (OURS, MACHINE):
        return sys.executable
    python: str | None = args.hf_python if side.startswith("transformers") else args.alt_python
    return python


def planned(args: argparse.Namespace) -> Iterator[Planned]:
    """All runs, each once, with a different first side in each repeat."""
    sides = [side for side in LABELS if python_of(side, args)]
    for repeat in range(1, args.repeats + 1):
        yield Planned(MACHINE, Row("baseline"), repeat)
        first = (repeat - 1) % len(sides)
        turns = [(side, row) for row in args.rows for side in sides[first:] + sides[:first]]
        yield from dict.fromkeys(Planned(side, row.of_side(side), repeat) for side, row in turns)


def quiet_run(each: Planned, title: str, args: argparse.Namespace) -> Run | None:
    """Try up to three times until others do not disturb the run; return the least disturbed one, None if one fails."""
    tries: list[Run] = []
    while len(tries) < TRIES and not (tries and tries[-1]["others_cpu"] <= MAX_OTHERS):
        module = f"benchmarks.peers.{MODULES.get(each.side, 'others')}"
        command = [python_of(each.side, args), "-m", module, each.side, each.row, str(args.samples), str(args.threads)]
        began, others, env = time.monotonic(), others_cpu_s(), environment(args.threads)
        done = subprocess.run(command, cwd=CHECKOUT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{title}: FAILED: {(done.stderr.strip() or 'no message').splitlines()[-1]}", flush=True)
            return None
        used = max(0.0, (others_cpu_s() - others) / (time.monotonic() - began))
        run: Run = json.loads(done.stdout.splitlines()[-1])
        speed = f"{run['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in run else "rates measured"
        print(f"{title}: {speed}; others used {used:.2f} processors", flush=True)
        tries.append(run | {"others_cpu": used})
    return min(tries, key=lambda run: run["others_cpu"])


def others_cpu_s() -> float:
    """Processor seconds used by processes other than ours, also by other virtual machines on this host (Linux)."""
    user, nice, system, _, _, *others = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    everyone = (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")
    return everyone - sum(used.ru_utime + used.ru_stime for used in ours)


def environment(threads: int) -> dict[str, str]:
    """The environment of every side's runs; modules are found only in the checkout."""
    env = child_environment(on_cpu=True) | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    del env["PYTHONPATH"]
    return env


def report(args: argparse.Namespace, runs: list[Run], about: Run) -> None:
    """Print and write the results."""
    summaries = [summary(row, runs, lengths(args.samples)) for row in args.rows]
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    torch.set_num_threads(args.threads)  # part of the device's name
    record = about | {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "machine": {
            "device": device_name(torch.device("cpu")),
            "flags": [flag for flag in CPU_FLAGS if flag in flags],
            "processors": os.cpu_count(),
            "memory_mib": round(total_memory_bytes() / MIB),
        },
        "versions": {run["side"]: run["versions"] for run in runs},
        "measured": [run for run in runs if run["side"] == MACHINE],
        "rows": summaries,
    }
    page = markdown(summaries)
    write_json(args.output / "results.json", record)
    write_text(args.output / "results.md", page)
    print(page)


def code() -> str:
    """The measured commit, with `-dirty` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
