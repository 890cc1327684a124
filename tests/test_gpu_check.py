"""`python -m benchmarks.gpu`: all that a CPU can run of it does; a part that fails or hangs stops no other."""

import json
import time
from pathlib import Path

import pytest
from conftest import CHECKOUT, run

from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu.check import Numbers, Part, write

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


def test_what_was_found_elsewhere_is_not_taken_for_this_device(tmp_path: Path, monkeypatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(gpu_check, "PARTS", gpu_check.PARTS[:1])
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)

    def start(part: Part, file: Path, asked: Numbers, limit_s: float) -> None:
        assert not file.exists()
        runs.append(asked["device"])
        write(file, asked, "done", 1.0)

    monkeypatch.setattr(gpu_check, "start_part", start)
    for name, options in (("-", ["--dry"]), ("A", []), ("A", []), ("B", []), ("B", ["--model", "tiny"])):
        monkeypatch.setattr(gpu_check.torch.cuda, "get_device_name", lambda _, name=name: name)
        monkeypatch.setattr(gpu_check.sys, "argv", ["check", "--output", str(tmp_path), *options])
        assert gpu_check.main() == 0
    assert runs == ["the CPU", "A", "B", "B"]


@pytest.mark.parametrize(("limit_s", "status"), [(0.05, "out of time"), (60, "failed")])
def test_a_part_that_does_not_end_well_leaves_that_behind(tmp_path: Path, monkeypatch, limit_s, status: str) -> None:
    part = gpu_check.PARTS[0]
    arguments = ["check", "--dry", "--output", str(tmp_path), *(["--bad"] if status == "failed" else [])]
    monkeypatch.setattr(gpu_check.sys, "argv", arguments)
    monkeypatch.chdir(CHECKOUT)
    gpu_check.start_part(part, tmp_path / "facts.json", {}, limit_s)
    assert json.loads((tmp_path / "facts.json").read_text())["status"] == status


def test_a_part_that_is_stopped_takes_its_commands_along(tmp_path: Path, monkeypatch) -> None:
    program, started = tmp_path / "program", tmp_path / "started"
    program.write_text(f"#!/bin/sh\nsleep 60 </dev/null &\necho $! > {started}\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(program))
    gpu_check.start_part(gpu_check.PARTS[0], tmp_path / "facts.json", {}, 2)
    stat, ends = Path(f"/proc/{started.read_text().strip()}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":  # not yet waited for by whoever adopted it
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_tests_that_are_run_side_by_side_see_the_gpu_that_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    """pytest's own options have them run so, in processes that do not know which file was asked for."""
    (tmp_path / "says.py").write_text(
        "import os, pathlib\n"
        "def pytest_collection_finish():\n"
        "    process = os.environ.get('PYTEST_XDIST_WORKER', 'main')\n"
        f"    (pathlib.Path({str(tmp_path)!r}) / process).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of this test itself
    environment = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(tmp_path)}
    for file, seen in (("test_gpu.py", "0"), ("test_tokenizer_json.py", "")):
        run("pytest", "-n", "1", "-p", "says", "-k", "no_such_test", f"tests/{file}", cwd=CHECKOUT, env=environment)
        assert (tmp_path / "gw0").read_text() == seen


def test_without_a_gpu_it_says_what_there_is() -> None:
    done = run("benchmarks.gpu", cwd=CHECKOUT)
    assert done.returncode == 2
    assert "--dry runs on the CPU" in done.stderr
