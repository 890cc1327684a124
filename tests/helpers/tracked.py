"""Runs to be tracked, and what W&B holds of them, read back from the files of offline runs."""

import csv
import json
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.proto import wandb_internal_pb2

from llama_ft.config import DataConfig, GpuConfig, ModelConfig, OptimConfig, TrackerConfig, TrackerMode, TrainConfig
from llama_ft.config.presets import preset
from llama_ft.records.metrics import METRICS_FILE, StepMetrics, line_of
from llama_ft.records.result import Result, Status, new_result, read_result, write_result
from llama_ft.tracking import start_tracker, wandb_run
from llama_ft.tracking.base import NOT_TRACKED, RUN_FILES

OFFLINE = TrackerConfig(mode=TrackerMode.offline)
STEPS = [StepMetrics(n, 3, 8.0 / n, None if n == 2 else 0.5, 1e-3, 10 * n, 7.5, 3.5, 0.1 * n) for n in (1, 2, 3)]
BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, LAST = 1, 2, 4
CHUNK_FIELDS = ((0, 4), (4, 6), (6, 7))


def write_run(run_dir: Path, status: Status = "ok", tracker: TrackerConfig = OFFLINE) -> Result:
    """The files of a run with LoRA, or without in a folder called baseline, that ended so."""
    config = TrainConfig(
        model=preset("model", "tiny", ModelConfig),
        optim=OptimConfig(lora=run_dir.name != "baseline"),
        data=DataConfig(name="sample"),
        gpu=GpuConfig(name="auto"),
        tracker=tracker,
    )
    result = new_result(config, "a command")
    result.status, result.error = status, None if status == "ok" else f"why it is {status}"
    if status == "ok":
        result.device, result.runtime_s, result.peak_memory_mib, result.tokens_per_s = "a device", 1.5, 100.25, 7.5
        result.memory_mib, result.trainable_percent = {"parameter": 60.0, "other": 40.25}, 12.5
        (run_dir / METRICS_FILE).write_text("".join(map(line_of, STEPS)))
    (run_dir / "config.yaml").write_text(config.to_yaml())
    write_result(run_dir, result)
    return result


def track(run_dir: Path, tracker: TrackerConfig = OFFLINE, group: str | None = None) -> list[str]:
    """Track the run of a folder from start to end; what was said."""
    said: list[str] = []
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    tracking = start_tracker(tracker, run_dir, settings, group, said.append)
    for step in STEPS:
        tracking.step(step)
    tracking.finish(read_result(run_dir))
    return said


@contextmanager
def fresh_wandb(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B anew in this process, in a home in which nobody has logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "online")  # so that it is put back where a run sets it
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    wandb_run.stop()
    home.mkdir()
    yield
    wandb_run.stop()


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
    files: set[str] = field(default_factory=set)
    artifacts: dict[str, set[str]] = field(default_factory=dict)  # paths by the artifact's name
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


def read_wandb(folder: Path) -> WandbFile:
    """The folder's one offline run."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    kept = WandbFile(file.parent / "files")
    for raw in raw_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            kept.run = record.run
            merge(kept.config, record.run.config.update)
        elif kind == "config":
            merge(kept.config, record.config.update)
        elif kind == "history":
            kept.history.append({})
            merge(kept.history[-1], record.history.item)
        elif kind == "summary":
            merge(kept.summary, record.summary.update)
        elif kind == "files":
            kept.files |= {file.path for file in record.files.files}
        elif kind == "artifact":
            kept.artifacts[record.artifact.name] = {entry.path for entry in record.artifact.manifest.contents}
        elif kind == "exit":
            kept.exit_code = record.exit.exit_code
    return kept


def own(values: dict[str, Any]) -> dict[str, Any]:
    """Without what W&B adds."""
    return {key: value for key, value in values.items() if not key.startswith("_")}


def assert_history_is(history: list[dict[str, Any]], metrics: Path) -> None:
    rows: dict[int, dict[str, Any]] = {}  # of an optimizer step, and of the held-out loss after it
    for line in map(json.loads, metrics.open()) if metrics.exists() else ():
        rows.setdefault(line["step"], {}).update(line)
    assert [own(logged) | {"step": logged["_step"]} for logged in history] == list(rows.values())


def assert_is_the_local_run(run_dir: Path, group: str) -> None:
    """What W&B holds is what the run's own files say."""
    kept, result = read_wandb(run_dir), read_result(run_dir)
    assert result is not None
    assert_history_is(kept.history, run_dir / METRICS_FILE)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert own(kept.config) == config | {"combination": result.combination, "device": result.device}
    assert {key: kept.summary[key] for key in asdict(result).keys() - set(NOT_TRACKED)} == {
        key: value for key, value in asdict(result).items() if key not in NOT_TRACKED
    }
    for name, file in RUN_FILES.items():
        assert (name in kept.files) == (run_dir / file).exists()
        assert name not in kept.files or (kept.folder / name).read_bytes() == (run_dir / file).read_bytes()
    assert "config.yaml" not in kept.files  # W&B would write its own over it
    run = kept.run
    assert (run.display_name, run.run_group, run.job_type) == (run_dir.name, group, "train")
    assert list(run.tags) == [result.combination, "tiny", "auto"]
    assert kept.exit_code == (0 if result.status == "ok" else 1)


def assert_table_is(kept: WandbFile, csv_file: Path) -> None:
    """The table that W&B holds is the sweep's."""
    table = kept.json("media/table/table2_*.table.json")
    columns, *rows = csv.reader(csv_file.open(newline=""))
    assert table["columns"] == columns
    assert [["" if value is None else str(value) for value in row] for row in table["data"]] == rows
