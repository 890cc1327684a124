"""`python -m benchmarks.gpu`: all that a CPU can run of it does; a part that fails or hangs stops no other."""

import json
from pathlib import Path

import pytest
from conftest import CHECKOUT, run

from benchmarks.gpu import __main__ as gpu_check

pytestmark = [pytest.mark.process, pytest.mark.slow]


def test_all_that_a_cpu_can_show_holds_and_is_not_run_twice(tmp_path: Path) -> None:
    arguments = ("benchmarks.gpu", "--dry", "--minutes", "20", "--output", str(tmp_path))
    done = run(*arguments, cwd=CHECKOUT, timeout=1000)
    parts = {part.name: json.loads((tmp_path / f"{part.name}.json").read_text()) for part in gpu_check.PARTS}
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: part["status"] for name, part in parts.items() if part["status"] != "done"} == {"tests": "not here"}
    assert all(claim["holds"] for part in parts.values() for claim in part["claims"])
    assert parts["plan"]["numbers"]["measured"]["lora"]["status"] == "ok"
    assert parts["out_of_memory"]["numbers"]["limit of 300 MiB"]["status"] == "oom"
    again = run(*arguments, cwd=CHECKOUT, timeout=60)
    assert again.stdout.count("done before") == len(gpu_check.PARTS)
    assert "a resumed run" in again.stdout or "undisturbed" in again.stdout


@pytest.mark.parametrize(("limit_s", "status"), [(0.05, "out of time"), (60, "failed")])
def test_a_part_that_does_not_end_well_leaves_that_behind(tmp_path: Path, monkeypatch, limit_s, status: str) -> None:
    part = gpu_check.PARTS[0]
    arguments = ["check", "--dry", "--output", str(tmp_path), *(["--bad"] if status == "failed" else [])]
    monkeypatch.setattr(gpu_check.sys, "argv", arguments)
    monkeypatch.chdir(CHECKOUT)
    gpu_check.start_part(part, tmp_path / "facts.json", limit_s)
    assert json.loads((tmp_path / "facts.json").read_text())["status"] == status


def test_without_a_gpu_it_says_what_there_is() -> None:
    done = run("benchmarks.gpu", cwd=CHECKOUT)
    assert done.returncode == 2
    assert "--dry runs on the CPU" in done.stderr
