"""W&B, read back from the files of real offline runs; and what happens when it is off or fails."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Sweep, injected, run
from wandb.proto import wandb_internal_pb2

from llama_ft.config import TrackerConfig, TrackerMode
from llama_ft.tracking import start_tracker
from llama_ft.tracking.wandb_run import has_key

BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


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


SETTINGS = {"optim": {"ga": True, "lora": True}, "model": {"name": "tiny"}, "gpu": {"name": "auto"}}
CHUNK_FIELDS = ((0, 4), (4, 6), (6, 7))


@dataclass
class WandbFile:
    """What a `.wandb` file says of its run."""

    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def merge(into: dict[str, Any], items: Any) -> None:
    for item in items:
        *parents, last = list(item.nested_key) or [item.key]
        target = into
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = json.loads(item.value_json)


def read_wandb(run_dir: Path) -> WandbFile:
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    found = WandbFile()
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
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


# ------------------------------------------------------------------------------------------------------ what W&B holds


@pytest.fixture(scope="module")
def tracked(limited_sweep: Sweep) -> dict[str, WandbFile]:
    return {name: read_wandb(limited_sweep.folder / name) for name in ("baseline", "lora")}


def test_history_is_the_metrics_file(limited_sweep: Sweep, tracked: dict[str, WandbFile]) -> None:
    lines = [json.loads(line) for line in (limited_sweep.folder / "lora" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert len(tracked["lora"].history) == len(lines)
    for logged, line in zip(tracked["lora"].history, lines, strict=True):
        assert logged.pop("_step") == line.pop("step")
        assert {key: value for key, value in logged.items() if not key.startswith("_")} == line
        assert line.keys() >= {"loss", "lr", "grad_norm", "tokens_per_s", "memory_mb"}


def test_config_is_the_resolved_config(limited_sweep: Sweep, tracked: dict[str, WandbFile]) -> None:
    for name, run_file in tracked.items():
        resolved = yaml.safe_load((limited_sweep.folder / name / "config.yaml").read_text())
        logged = {key: value for key, value in run_file.config.items() if not key.startswith("_")}
        assert logged == resolved | {"combination": name}
        assert logged["optim"]["lora"] == (name == "lora")


def test_summary_holds_the_result(limited_sweep: Sweep, tracked: dict[str, WandbFile]) -> None:
    for name, result in limited_sweep.results().items():
        summary = tracked[name].summary
        for key in ("status", "error", "peak_memory_mb", "runtime_s", "config_hash", "trainable_params"):
            assert summary[key] == result[key], (name, key)
    assert tracked["baseline"].summary["status"] == "oom"


def test_summary_is_not_overwritten_by_the_last_step(limited_sweep: Sweep, tracked: dict[str, WandbFile]) -> None:
    summary, result = tracked["lora"].summary, limited_sweep.results()["lora"]
    for key in ("memory_mb", "tokens", "tokens_per_s"):  # names that both have
        assert summary[key] == result[key], key


def test_runs_are_named_and_grouped_by_sweep(tracked: dict[str, WandbFile]) -> None:
    assert {name: run_file.run.display_name for name, run_file in tracked.items()} == {n: n for n in tracked}
    assert {run_file.run.run_group for run_file in tracked.values()} == {"limited"}
    assert {run_file.run.project for run_file in tracked.values()} == {"llama_ft"}
    assert len({run_file.run.run_id for run_file in tracked.values()}) == 2


def test_each_run_is_closed_as_it_ended(tracked: dict[str, WandbFile]) -> None:
    assert tracked["lora"].exit_code == 0
    assert tracked["baseline"].exit_code not in (None, 0)


def test_offline_tracking_does_not_touch_the_terminal(limited_sweep: Sweep) -> None:
    assert "wandb" not in (limited_sweep.process.stdout + limited_sweep.process.stderr).lower()


# -------------------------------------------------------------------------------------------------------- off, failing


def test_disabled_does_not_start_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("W&B was started"))
    said: list[str] = []
    tracker = start_tracker(TrackerConfig(mode=TrackerMode.disabled), tmp_path, {}, None, said.append)
    tracker.step({"step": 1, "loss": 1.0})
    tracker.finish({"status": "ok"})
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_start_is_said_in_a_sentence_and_training_goes_on(tmp_path: Path) -> None:
    code = "import wandb\ndef fail(*_, **__): raise wandb.errors.CommError('no way\\nto the server')\nwandb.init = fail"
    env = injected(tmp_path / "inject", into="llama_ft.train", code=code)
    overrides = ("optim=lora", "training.max_samples=2", "hydra.run.dir=run", "tracker.mode=offline")
    done = run("llama_ft.train", *overrides, cwd=tmp_path, env=env)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert done.returncode == 0, done.stdout
    assert result["status"] == "ok"
    (said,) = (line for line in (done.stdout + done.stderr).splitlines() if "W&B" in line)
    assert "no way" in said
    assert "Traceback" not in done.stdout + done.stderr


class Broken:
    """Stands for a W&B run; the method named `breaks` fails."""

    def __init__(self, breaks: str, folder: Path | None = None) -> None:
        self.breaks, self.dir = breaks, str(folder)
        self.summary: dict[str, Any] = {}

    def log(self, *_: Any, **__: Any) -> None:
        self._fail_if("log")

    def finish(self, *_: Any, **__: Any) -> None:
        self._fail_if("finish")

    def _fail_if(self, method: str) -> None:
        if method == self.breaks:
            raise OSError("the connection is gone")


@pytest.mark.parametrize("breaks", ["log", "finish"])
def test_a_tracker_that_breaks_later_says_so_once(breaks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.init", lambda **_: Broken(breaks, tmp_path / "wandb" / "run" / "files"))
    said: list[str] = []
    tracker = start_tracker(TrackerConfig(mode=TrackerMode.offline), tmp_path, SETTINGS, None, said.append)
    for step in (1, 2):
        tracker.step({"step": step, "loss": 1.0})
    tracker.finish({"status": "ok"})
    (sentence,) = said
    assert "the connection is gone" in sentence


# --------------------------------------------------------------------------------------------------------- the default


def chosen_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    chosen: dict[str, Any] = {}
    monkeypatch.setattr("wandb.init", lambda **settings: chosen.update(settings) or Broken(""))
    start_tracker(TrackerConfig(), tmp_path, SETTINGS, "a sweep", [].append)
    return chosen.get("mode")


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nobody has logged in."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_without_a_key_the_default_is_offline(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_key()
    assert chosen_mode(monkeypatch, no_key) == "offline"


def test_a_key_in_the_environment_makes_the_default_online(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert chosen_mode(monkeypatch, no_key) == "online"


def test_a_login_makes_the_default_online(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_key / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    assert chosen_mode(monkeypatch, no_key) == "online"


def test_wandb_mode_of_the_environment_is_respected(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert chosen_mode(monkeypatch, no_key) in (None, mode)
