"""W&B, read back from the files of real offline runs; and what happens when it is off or fails."""

import csv
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Sweep, environment, injected
from wandb.errors import CommError
from wandb.proto import wandb_internal_pb2

from llama_ft.config import TrackerConfig, TrackerMode
from llama_ft.records.result import STATUSES
from llama_ft.tracking import start_tracker, wandb_run
from llama_ft.tracking.wandb_run import WandbRun, children, has_key

BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
CHUNK_FIELDS = ((0, 4), (4, 6), (6, 7))


def raw_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: each a run of chunks of checksum, length, kind and bytes; none spans two blocks."""
    assert data[:4] == b":W&B"
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # too short for a chunk: padding
            position += BLOCK - position % BLOCK
            continue
        checksum, size, kind = (int.from_bytes(data[position + a : position + b], "little") for a, b in CHUNK_FIELDS)
        chunk = data[position + HEADER : position + HEADER + size]
        assert zlib.crc32(bytes([kind]) + chunk) == checksum
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts
        position += HEADER + size


@dataclass
class WandbFile:
    """What a `.wandb` file says of its run, and the folder of the files that go with it."""

    folder: Path
    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None

    def json(self, pattern: str) -> Any:
        """The content of the one file that matches."""
        (file,) = self.folder.glob(pattern)
        return json.loads(file.read_text())


def merge(into: dict[str, Any], items: Any) -> None:
    for item in items:
        *parents, last = list(item.nested_key) or [item.key]
        target = into
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = json.loads(item.value_json)


def own(values: dict[str, Any]) -> dict[str, Any]:
    """Without what W&B adds."""
    return {key: value for key, value in values.items() if not key.startswith("_")}


def read_wandb_file(file: Path) -> WandbFile:
    found = WandbFile(file.parent / "files")
    for raw in raw_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            merge(found.config, record.run.config.update)
        elif kind == "config":
            merge(found.config, record.config.update)
        elif kind == "history":
            found.history.append({})
            merge(found.history[-1], record.history.item)
        elif kind == "summary":
            merge(found.summary, record.summary.update)
        elif kind == "files":
            found.files += [file.path for file in record.files.files]
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def read_wandb(run_dir: Path) -> WandbFile:
    """The folder's one offline run."""
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return read_wandb_file(file)


# ------------------------------------------------------------------------------------------------------ what W&B holds


@pytest.fixture(scope="module")
def tracked(limited_sweep: Sweep) -> dict[str, WandbFile]:
    """The W&B runs of a sweep's rows."""
    return {name: read_wandb(limited_sweep.folder / name) for name in ("baseline", "lora")}


@pytest.fixture(scope="module")
def summary_run(limited_sweep: Sweep) -> WandbFile:
    """The sweep's own W&B run."""
    return read_wandb(limited_sweep.folder)


def assert_history_is(history: list[dict[str, Any]], metrics: Path) -> None:
    lines = [json.loads(line) for line in metrics.open()]
    assert [own(logged) | {"step": logged["_step"]} for logged in history] == lines


def test_history_is_the_metrics_file(limited_sweep: Sweep, tracked: dict[str, WandbFile]) -> None:
    assert_history_is(tracked["lora"].history, limited_sweep.folder / "lora" / "metrics.jsonl")
    assert [logged["_step"] for logged in tracked["lora"].history] == [1, 2, 3, 4]
    assert all(
        logged.keys() >= {"loss", "lr", "grad_norm", "tokens_per_s", "memory_mib"} for logged in tracked["lora"].history
    )


def test_config_is_the_resolved_config_and_the_device(limited_sweep: Sweep, tracked: dict[str, WandbFile]) -> None:
    for name, run_file in tracked.items():
        resolved = yaml.safe_load((limited_sweep.folder / name / "config.yaml").read_text())
        device = limited_sweep.results()[name]["device"]
        assert own(run_file.config) == resolved | {"combination": name, "device": device}


def test_a_dashboard_can_group_by_technique_model_and_gpu(tracked: dict[str, WandbFile]) -> None:
    for name, run_file in tracked.items():
        assert run_file.config["optim"] == {"ga": False, "mp": False, "lora": name == "lora", "gc": False}
        assert (run_file.config["model"]["name"], run_file.config["gpu"]["name"]) == ("tiny", "auto")
        assert list(run_file.run.tags) == [name, "tiny", "auto"]


def test_runs_are_named_and_grouped_by_sweep(tracked: dict[str, WandbFile], summary_run: WandbFile) -> None:
    runs = {**tracked, "limited: table": summary_run}
    assert {name: run_file.run.display_name for name, run_file in runs.items()} == {name: name for name in runs}
    assert {run_file.run.run_group for run_file in runs.values()} == {"limited"}
    assert {run_file.run.project for run_file in runs.values()} == {"llama_ft"}
    assert {run_file.run.job_type for run_file in tracked.values()} == {"train"}
    assert summary_run.run.job_type == "sweep"
    assert len({run_file.run.run_id for run_file in runs.values()}) == 3


def test_summary_holds_the_result(limited_sweep: Sweep, tracked: dict[str, WandbFile]) -> None:
    for name, result in limited_sweep.results().items():
        summary = tracked[name].summary
        for key in result.keys() - set(wandb_run.NOT_IN_SUMMARY):
            assert summary[key] == result[key], (name, key)
    summary = tracked["lora"].summary
    assert summary.keys() >= {"status", "runtime_s", "peak_memory_mib", "trainable_percent", "memory_max_mib"}
    assert summary["memory_mib"].keys() == {"parameter", "gradient", "optimizer_state", "activation", "other"}
    assert tracked["baseline"].summary["status"] == "oom"


def test_config_result_and_metrics_are_kept_as_files(limited_sweep: Sweep, tracked: dict[str, WandbFile]) -> None:
    """Under a name that is free: W&B writes a config.yaml of its own over ours."""
    for name, run_file in tracked.items():
        for kept, file in wandb_run.FILES.items():
            source = limited_sweep.folder / name / file
            assert (kept in run_file.files) == source.exists(), (name, kept)
            if source.exists():
                assert (run_file.folder / kept).read_bytes() == source.read_bytes()
    assert set(tracked["lora"].files) >= {"resolved_config.yaml", "result.json", "metrics.jsonl"}
    assert "config.yaml" not in tracked["lora"].files


def test_offline_tracking_does_not_touch_the_terminal(limited_sweep: Sweep) -> None:
    assert "wandb" not in (limited_sweep.process.stdout + limited_sweep.process.stderr).lower()


# ---------------------------------------------------------------------------------------------------- the sweep's run


def test_the_sweeps_table_is_table2(limited_sweep: Sweep, summary_run: WandbFile) -> None:
    table = summary_run.json("media/table/table2_*.table.json")
    columns, *rows = csv.reader((limited_sweep.folder / "table2.csv").open(newline=""))
    assert table["columns"] == columns
    assert [["" if value is None else str(value) for value in row] for row in table["data"]] == rows
    assert [row[0] for row in rows] == ["baseline", "lora"]
    (logged,) = summary_run.history
    assert (logged["table2"]["nrows"], logged["table2"]["ncols"]) == (len(rows), len(columns))
    assert (summary_run.folder / logged["table2"]["path"]).is_file()


def test_the_sweeps_bar_charts_show_its_figures(limited_sweep: Sweep, summary_run: WandbFile) -> None:
    result = limited_sweep.results()["lora"]
    for key in ("peak_memory_mib", "runtime_s", "tokens_per_s"):
        bars = summary_run.json(f"media/table/charts/{key}_table_*.table.json")
        assert bars == {"columns": ["run", key], "data": [["lora", result[key]]]}  # the baseline has none
        panel = summary_run.config["_wandb"]["visualize"][f"charts/{key}"]["panel_config"]
        assert panel["panelDefId"] == "wandb/bar/v0"
        assert panel["fieldSettings"] == {"label": "run", "value": key}


def test_the_sweeps_pictures_and_report_are_kept(limited_sweep: Sweep, summary_run: WandbFile) -> None:
    picture = (limited_sweep.folder / "table2.png").read_bytes()
    assert (summary_run.folder / summary_run.history[0]["pictures/table2"]["path"]).read_bytes() == picture
    for name in ("table2.md", "table2.csv", "table2.png", "report.html"):
        assert name in summary_run.files
        assert (summary_run.folder / name).read_bytes() == (limited_sweep.folder / name).read_bytes()
    assert summary_run.exit_code == 0


# -------------------------------------------------------------------------------------------- within this process

SETTINGS = {"optim": {"ga": True, "lora": True}, "model": {"name": "tiny"}, "gpu": {"name": "auto"}}
OFFLINE, ONLINE = TrackerConfig(mode=TrackerMode.offline), TrackerConfig(mode=TrackerMode.online)


@contextmanager
def fresh_wandb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B anew in this process, in a home in which nobody has logged in."""
    for name in (*(name for name in os.environ if name.startswith("WANDB_")), "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setattr(WandbRun, "reachable", True)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    wandb_run.end_session()
    (folder / "home").mkdir()
    yield
    wandb_run.end_session()


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody has logged in; the folder of a run."""
    (tmp_path / "run").mkdir()
    with fresh_wandb(tmp_path, monkeypatch):
        yield tmp_path / "run"


def track(run_dir: Path, config: TrackerConfig = OFFLINE, status: str | None = "ok", n_steps: int = 2) -> list[str]:
    """A run tracked from start to end; what was said."""
    said: list[str] = []
    tracker = start_tracker(config, run_dir, SETTINGS, None, said.append)
    for step in range(1, n_steps + 1):
        tracker.step({"step": step, "loss": 1.0 / step})
    tracker.finish({"status": status, "device": "a device"} if status else None)
    return said


def sends_again(sentence: str) -> Path:
    """The folder in the sentence's command."""
    command = sentence.rpartition("The local files hold everything: ")[2].removesuffix(" sends it.")
    *report, folder, upload = shlex.split(command)
    assert (report, upload) == (["python", "-m", "llama_ft.report"], "tracker.upload=true")
    return Path(folder)


def test_a_run_that_is_ok_is_finished_and_others_have_failed(no_key: Path) -> None:
    for status in (*STATUSES, None):
        run_dir = no_key / str(status)
        run_dir.mkdir()
        assert track(run_dir, status=status) == []
        run_file = read_wandb(run_dir)
        assert run_file.exit_code == (0 if status == "ok" else 1), status
        assert run_file.summary.get("status") == status
        assert [logged["loss"] for logged in run_file.history] == [1.0, 0.5]


def test_a_folder_has_one_wandb_run_however_often_it_is_run(no_key: Path) -> None:
    for _ in range(3):  # within a second too, when W&B numbers its folders
        assert track(no_key) == []
    run_files = [read_wandb_file(file) for file in no_key.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(run_files) == 3
    assert len({run_file.run.run_id for run_file in run_files}) == 1


# -------------------------------------------------------------------------------------------------------- off, failing


def test_disabled_does_not_start_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("W&B was started"))
    assert track(tmp_path, TrackerConfig(mode=TrackerMode.disabled)) == []
    assert list(tmp_path.iterdir()) == []


class Broken:
    """Stands for a W&B run; the method named `breaks` fails."""

    def __init__(self, breaks: str, folder: Path | None = None) -> None:
        self.breaks, self.dir = breaks, str(folder)
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}

    def log(self, *_: Any, **__: Any) -> None:
        self._fail_if("log")

    def finish(self, *_: Any, **__: Any) -> None:
        self._fail_if("finish")

    def _fail_if(self, method: str) -> None:
        if method == self.breaks:
            raise OSError("the connection is gone")


@pytest.mark.parametrize(("breaks", "where"), [("log", "optimizer step 1"), ("finish", "the end")])
def test_a_tracker_that_breaks_later_says_so_once(
    breaks: str, where: str, no_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wandb.init", lambda **_: Broken(breaks, no_key / "wandb" / "run" / "files"))
    (sentence,) = track(no_key)
    assert sentence.startswith(f"W&B failed at {where} of run (the connection is gone) and has only part of it. ")
    assert sends_again(sentence) == no_key


@pytest.mark.parametrize("level", ["ERROR", "ERROR+4"])
def test_what_the_service_says_it_lost_is_passed_on(level: str, no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = no_key / "wandb" / "run" / "logs" / "debug-internal.log"
    log.parent.mkdir(parents=True)
    entries = [{"level": "INFO", "msg": "started"}, {"level": level, "msg": "HTTP error", "status": 401}]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    monkeypatch.setattr("wandb.init", lambda **_: Broken("", log.parent.parent / "files"))
    (sentence,) = track(no_key)
    assert "W&B failed at the end of run (HTTP error: 401) and has only part of it." in sentence


def test_a_folder_that_cannot_be_written_into(no_key: Path) -> None:
    (no_key / "wandb").mkdir()
    with mounted(no_key / "wandb", "ro"):
        (sentence,) = track(no_key)
    assert sentence.startswith("W&B failed at the start of run (Read-only file system: ")
    assert "has nothing of it" in sentence
    assert sends_again(sentence) == no_key


def test_a_key_that_cannot_be_one(no_key: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    (sentence,) = track(no_key, TrackerConfig())
    assert sentence.startswith("W&B cannot be used online (WANDB_API_KEY invalid: ")
    assert "offline from here on" in sentence
    assert read_wandb(no_key).exit_code == 0
    assert capfd.readouterr() == ("", "")


def test_online_without_a_key_asks_nothing(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr("wandb.init", lambda **settings: modes.append(settings["mode"]) or Broken(""))
    (sentence,) = track(no_key, ONLINE)
    assert sentence.startswith("W&B cannot be used online (there is no API key")
    assert modes == ["offline"]


def test_a_network_that_is_gone_is_waited_for_once_and_said_once(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def init(mode: str, **_: Any) -> Broken:
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("no answer")
        return Broken("")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("wandb.init", init)
    said = track(no_key, TrackerConfig()) + track(no_key, TrackerConfig())
    assert len(said) == 1
    assert "(no answer): offline from here on" in said[0]
    assert modes == ["online", "offline", "offline"]


# ---------------------------------------------------------------------- failing under the real command: no network, and

KEY = "5ec2e75ec2e75ec2e75ec2e75ec2e75ec2e7abcd"
SIZES = ("dim=64", "ffn_dim=96", "n_layers=2", "n_heads=4", "n_kv_heads=4")
SMALL = ["checkpoint=random", *(f"model.{size}" for size in SIZES)]
KILLED, BLOCKED, CRAMPED = (f"lora,training.seed={seed}" for seed in (1, 2, 3))
# The command's process, then the runs' processes: the first waits within its training until W&B's service is gone.
INJECTED = """
if "llama_ft.launch.child" not in sys.orig_argv:
    from llama_ft.tracking import wandb_run
    wandb_run.SECONDS_TO_START = 1
elif "seed=1" in sys.orig_argv[-2]:
    import time
    from pathlib import Path
    from llama_ft.training.metrics import MetricsFile
    record = MetricsFile.record
    def record_and_wait(self, *arguments):
        record(self, *arguments)
        self.flush()
        Path("stepped").touch()
        end = time.monotonic() + 60
        while not Path("killed").exists() and time.monotonic() < end:
            time.sleep(0.02)
    MetricsFile.record = record_and_wait
"""


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own in the folder; where that cannot be, the test is skipped."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def service_of(process: int) -> int:
    """The process of W&B's service that another one has started."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            number, name, _, parent = file.read_text().split()[:4]
            if (name, parent) == ("(wandb-core)", str(process)):
                return int(number)
    raise AssertionError(f"process {process} has no wandb-core")


def run_and_kill_the_service(cwd: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command, and kill W&B's service as soon as a run has made a step."""
    env = injected(cwd / "inject", into="llama_ft.train", code=INJECTED)
    env |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(cwd)}
    command = [sys.executable, "-m", "llama_ft.train", "-m", *SMALL, *overrides]
    streams: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=environment(env), **streams) as process:
        try:
            deadline = time.monotonic() + 60
            while not (cwd / "stepped").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if process.poll() is None:
                os.kill(service_of(process.pid), signal.SIGKILL)
                (cwd / "killed").touch()
            stdout, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def failing_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """Three rows without a network: W&B's service is killed, its folder cannot be made, and the disk is full."""
    cwd = tmp_path_factory.mktemp("failing")
    folder = cwd / "sweep"
    for name in (BLOCKED, CRAMPED):
        (folder / name).mkdir(parents=True)
    (folder / BLOCKED / "wandb").write_text("in the way")
    (folder / CRAMPED / "wandb").mkdir()
    options = (
        "optim=lora",
        "training.seed=1,2,3",
        "training.micro_batch_size=1",
        "training.max_samples=3",
        f"hydra.sweep.dir={folder}",
    )
    with ExitStack() as stack:
        try:
            stack.enter_context(mounted(folder / CRAMPED / "wandb", "size=16k"))
            (folder / CRAMPED / "wandb" / "everything else").write_bytes(bytes(16 * 1024))
        except pytest.skip.Exception:
            pass  # that row is not cramped then
        yield Sweep(folder, options, run_and_kill_the_service(cwd, *options))


def said_of(sweep: Sweep, name: str) -> str:
    """What was said of W&B while a row was run."""
    lines = [line.strip() for line in sweep.process.stdout.splitlines() if "W&B failed" in line and f" {name} " in line]
    assert len(lines) == 1, sweep.process.stdout
    return lines[0]


def test_whatever_happens_to_wandb_every_run_ends_ok(failing_sweep: Sweep) -> None:
    assert failing_sweep.process.returncode == 0, failing_sweep.process.stdout + failing_sweep.process.stderr
    assert {name: result["status"] for name, result in failing_sweep.results().items()} == dict.fromkeys(
        (KILLED, BLOCKED, CRAMPED), "ok"
    )
    for name in (KILLED, BLOCKED, CRAMPED):
        assert len((failing_sweep.folder / name / "metrics.jsonl").read_text().splitlines()) == 3


def test_nothing_of_wandbs_own_is_on_the_terminal(failing_sweep: Sweep) -> None:
    assert failing_sweep.process.stderr == ""
    lines = failing_sweep.process.stdout.splitlines()
    assert [line for line in lines if "wandb" in line.lower() and "W&B failed" not in line] == []
    assert "Traceback" not in failing_sweep.process.stdout


def test_a_network_that_is_not_there_is_said_once(failing_sweep: Sweep) -> None:
    (said,) = (line.strip() for line in failing_sweep.process.stdout.splitlines() if "online" in line)
    assert said.startswith("W&B cannot be used online (")
    assert sends_again(said) == failing_sweep.folder


def test_a_killed_service_is_said_with_what_was_lost(failing_sweep: Sweep) -> None:
    said = said_of(failing_sweep, KILLED)
    assert re.match(r"W&B failed at (optimizer step [123]|the end) of \S+ \(.+\) and has only part of it\. ", said)
    assert sends_again(said) == failing_sweep.folder
    assert read_wandb(failing_sweep.folder / KILLED).exit_code is None


def test_a_file_where_wandbs_folder_should_be(failing_sweep: Sweep) -> None:
    said = said_of(failing_sweep, BLOCKED)
    wandb_dir = failing_sweep.folder / BLOCKED / "wandb"
    assert re.match(rf"W&B failed at the start of \S+ \([^)]*{wandb_dir}\S*\) and has nothing of it\. ", said)
    assert sends_again(said) == failing_sweep.folder
    assert wandb_dir.read_text() == "in the way"


def test_a_full_disk_is_said(failing_sweep: Sweep) -> None:
    if not os.path.ismount(failing_sweep.folder / CRAMPED / "wandb"):
        pytest.skip("a file system cannot be mounted here")
    said = said_of(failing_sweep, CRAMPED)
    assert re.match(r"W&B failed at the (start|end) of \S+ \(No space left on device.*\) and has ", said)
    assert sends_again(said) == failing_sweep.folder


def test_the_sweeps_run_is_tracked_after_all_that(failing_sweep: Sweep) -> None:
    run_file = read_wandb(failing_sweep.folder)
    assert run_file.json("media/table/table2_*.table.json")["data"][0][0] == "lora"
    assert run_file.exit_code == 0


def test_a_key_is_in_no_file_and_on_no_terminal(failing_sweep: Sweep) -> None:
    files = [file for file in failing_sweep.folder.parent.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []
    assert KEY not in failing_sweep.process.stdout + failing_sweep.process.stderr


# --------------------------------------------------------------------------------------------------------- the default


def chosen_mode(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> Any:
    chosen: dict[str, Any] = {}
    monkeypatch.setattr("wandb.init", lambda **settings: chosen.update(settings) or Broken(""))
    start_tracker(TrackerConfig(), run_dir, SETTINGS, "a sweep", [].append)
    return chosen.get("mode")


def test_without_a_key_the_default_is_offline(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_key()
    assert chosen_mode(monkeypatch, no_key) == "offline"


def test_a_key_in_the_environment_makes_the_default_online(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert chosen_mode(monkeypatch, no_key) == "online"


@pytest.mark.parametrize("server", ["", "wandb.example.org"])
def test_a_login_makes_the_default_online(server: str, no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `wandb login`, or with a server `wandb login --host`, leaves behind."""
    home = Path.home()
    entry = f"machine {server or 'api.wandb.ai'}\n  login user\n  password {'0' * 40}\n"
    (home / ".netrc").write_text(entry)
    if server:
        settings = home / ".config" / "wandb" / "settings"
        settings.parent.mkdir(parents=True)
        settings.write_text(f"[default]\nbase_url = https://{server}\n")
    assert chosen_mode(monkeypatch, no_key) == "online"


def test_a_login_elsewhere_is_no_key(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path.home() / ".netrc").write_text(f"machine github.com\n  login user\n  password {'0' * 40}\n")
    assert chosen_mode(monkeypatch, no_key) == "offline"


def test_wandb_mode_of_the_environment_is_respected(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for mode, expected in (("offline", "offline"), ("disabled", None)):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert chosen_mode(monkeypatch, no_key) == expected


# ------------------------------------------------------------------------------------------------- a service that hangs


def test_a_frozen_service_is_killed_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECONDS_TO_STOP", "SECONDS_TO_FINISH"):
        monkeypatch.setattr(wandb_run, name, 1)
    said: list[str] = []
    tracker = start_tracker(TrackerConfig(mode=TrackerMode.offline), tmp_path, SETTINGS, None, said.append)
    tracker.step({"step": 1, "loss": 1.0})
    (service,) = children("wandb-core")
    os.kill(service, signal.SIGSTOP)
    began = time.monotonic()
    tracker.finish({"status": "ok"})
    assert time.monotonic() - began < 30
    (sentence,) = said
    assert "its service did not answer" in sentence
    assert "tracker.upload=true sends it" in sentence
    assert children("wandb-core") == []
    again = start_tracker(TrackerConfig(mode=TrackerMode.offline), tmp_path / "next", SETTINGS, None, said.append)
    again.finish({"status": "ok"})
    assert len(said) == 1


def test_a_run_that_was_deleted_from_wandb_is_sent_as_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb" / "run-20260101_000000-abc123").mkdir(parents=True)
    (tmp_path / "wandb" / "run-20260101_000000-abc123" / "run-abc123.wandb").touch()
    ids: list[str | None] = []

    def init(**settings: Any) -> Broken:
        ids.append(settings["id"])
        if settings["id"]:
            raise CommError("run abc123 was previously created and deleted; try a new run name")
        return Broken("", tmp_path / "wandb" / "run" / "files")

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    said: list[str] = []
    start_tracker(TrackerConfig(mode=TrackerMode.online), tmp_path, SETTINGS, None, said.append).finish(None)
    assert (ids, said) == (["abc123", None], [])
