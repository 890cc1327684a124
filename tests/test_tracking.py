"""Trackers, read back from the files of real offline W&B runs and of TensorBoard; and what happens when one fails."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import Sweep
from helpers.tracked import (
    OFFLINE,
    STEPS,
    assert_is_the_local_run,
    assert_table_is,
    fresh_wandb,
    read_wandb,
    track,
    write_run,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from llama_ft.config import TrackerConfig, TrackerKind, TrackerMode
from llama_ft.tracking import base, track_study, track_sweep, wandb_run

ONLINE, TENSORBOARD = TrackerConfig(mode=TrackerMode.online), TrackerConfig(TrackerKind.tensorboard)
PICTURE = Path(__file__).parent.parent / "docs" / "table2.png"
KEY = "0" * 40


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run with LoRA, where nobody has logged in to W&B."""
    folder = tmp_path / "sweep" / "lora"
    folder.mkdir(parents=True)
    write_run(folder)
    with fresh_wandb(tmp_path / "home", monkeypatch):
        yield folder


# -------------------------------------------------------------------------------------------------------- what W&B has


@pytest.mark.parametrize("status", ["ok", "oom", "interrupted"])
def test_an_offline_run_is_what_the_local_files_say(status: Any, run_dir: Path) -> None:
    write_run(run_dir, status)
    assert track(run_dir, OFFLINE, "sweep") == []
    assert_is_the_local_run(run_dir, "sweep")


def test_a_run_without_a_result_has_failed(run_dir: Path) -> None:
    (run_dir / "result.json").unlink()
    assert track(run_dir) == []
    assert read_wandb(run_dir).exit_code == 1


@pytest.mark.process
def test_the_runs_of_a_sweep_are_tracked_while_they_go_on(limited_sweep: Sweep) -> None:
    for name in ("baseline", "lora"):
        assert_is_the_local_run(limited_sweep.folder / name, "limited")
    table = read_wandb(limited_sweep.folder)
    assert_table_is(table, limited_sweep.folder / "table2.csv")
    assert (table.run.run_group, table.run.job_type, table.exit_code) == ("limited", "sweep", 0)
    assert table.files >= {"table2.md", "table2.csv", "table2.png", "report.html"}
    assert "wandb" not in (limited_sweep.process.stdout + limited_sweep.process.stderr).lower()


def test_a_sweep_has_a_run_with_table_charts_pictures_and_files(run_dir: Path) -> None:
    columns = ["combination", "variant", "model", "gpu", "peak_memory_mib", "runtime_s", "tokens_per_s"]
    rows = [["baseline", "", "tiny", "auto", None, None, None], ["lora", "rank=4", "tiny", "auto", 100.5, 1.5, 7.5]]
    sweep = run_dir.parent
    (sweep / "table2.png").write_bytes(PICTURE.read_bytes())
    said: list[str] = []
    track_sweep(OFFLINE, sweep, (columns, rows), ["table2.png", "absent.md"], said.append)
    kept = read_wandb(sweep)
    table = kept.json("media/table/table2_*.table.json")
    assert (said, table["columns"], table["data"]) == ([], columns, rows)
    for key, value in (("peak_memory_mib", 100.5), ("runtime_s", 1.5), ("tokens_per_s", 7.5)):
        bars = kept.json(f"media/table/charts/{key}_table_*.table.json")
        assert bars == {"columns": ["run", key], "data": [["lora rank=4", value]]}  # the baseline has none
        assert kept.config["_wandb"]["visualize"][f"charts/{key}"]["panel_config"]["panelDefId"] == "wandb/bar/v0"
    for path in ("table2.png", kept.history[0]["pictures/table2"]["path"]):
        assert (kept.folder / path).read_bytes() == PICTURE.read_bytes()
    assert "absent.md" not in kept.files
    assert (kept.run.display_name, kept.run.run_group, list(kept.run.tags)) == ("sweep: table", "sweep", ["sweep"])


@pytest.mark.parametrize("is_wanted", [True, False])
def test_what_was_trained_is_an_artifact_if_that_is_wanted(run_dir: Path, is_wanted: bool) -> None:
    trained = {"adapter_model.safetensors", "adapter_config.json"}
    for name in trained:
        (run_dir / name).write_bytes(b"{}")
    assert track(run_dir, replace(OFFLINE, artifacts=is_wanted)) == []
    assert read_wandb(run_dir).artifacts == ({f"{run_dir.name}-trained": trained} if is_wanted else {})


def test_a_study_has_a_run_with_its_numbers(run_dir: Path) -> None:
    track_study(OFFLINE, "kv_cache", {"speedup": 2.5}, [Path(shutil.copy(PICTURE, run_dir))], pytest.fail)
    kept = read_wandb(run_dir)
    assert (kept.run.display_name, kept.run.job_type, kept.summary["speedup"]) == ("kv_cache", "study", 2.5)
    assert "table2.png" in kept.files


def test_a_folder_has_one_wandb_run_however_often_it_is_run(run_dir: Path) -> None:
    for _ in range(3):  # within a second too, when W&B numbers its folders
        assert track(run_dir) == []
    assert len({file.name for file in run_dir.glob("wandb/offline-run-*/run-*.wandb")}) == 1


# ----------------------------------------------------------------------------------------------------- the environment


KEYS = TrackerConfig(mode=TrackerMode.offline, project="key", entity="key", group="key", tags=["key"], notes="key")


@pytest.mark.parametrize(
    ("tracker", "mode", "value"), [(TrackerConfig(), "offline", "variable"), (KEYS, "online", "key")]
)
def test_the_environment_holds_where_no_key_is_given(
    tracker: TrackerConfig, mode: str, value: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROJECT", "ENTITY", "RUN_GROUP", "NOTES", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", "variable")
    monkeypatch.setenv("WANDB_MODE", mode)
    track(run_dir, tracker, "sweep")
    run = read_wandb(run_dir).run
    assert [run.project, run.entity, run.run_group, run.notes] == [value] * 4
    assert list(run.tags) == ["lora", "tiny", "auto", value]


def test_an_id_in_the_environment_is_for_one_run_not_for_a_sweeps(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "job4711")
    monkeypatch.setenv("WANDB_NAME", "job")
    rows = [run_dir, run_dir.parent / "baseline"]
    rows[1].mkdir()
    for row in rows:
        write_run(row)
        track(row, OFFLINE, "sweep")
    study = run_dir.parent / "study"
    study.mkdir()
    track_study(OFFLINE, "kv_cache", {}, [study / "kv_cache.md"], pytest.fail)
    assert len({read_wandb(folder).run.run_id for folder in (*rows, study)} | {"job4711"}) == 4
    assert [read_wandb(row).run.display_name for row in rows] == ["lora", "baseline"]
    alone = run_dir.parent / "alone"
    alone.mkdir()
    write_run(alone)
    track(alone)
    assert (read_wandb(alone).run.run_id, read_wandb(alone).run.project) == ("job4711", "llama_ft")


@pytest.mark.parametrize("variable", [None, "WANDB_MODE"])
def test_disabled_does_not_start_wandb(variable: str | None, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable:
        monkeypatch.setenv(variable, "disabled")
    files = set(run_dir.iterdir())
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("W&B was started"))
    assert track(run_dir, TrackerConfig() if variable else TrackerConfig(TrackerKind.disabled)) == []
    assert set(run_dir.iterdir()) == files


@pytest.mark.parametrize(("place", "mode"), [("", "online"), ("api.wandb.ai", "online"), ("github.com", "offline")])
def test_the_default_is_online_where_there_is_a_key(
    place: str, mode: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place:  # what `wandb login` writes, or another program
        (Path.home() / ".netrc").write_text(f"machine {place}\n  login user\n  password {KEY}\n")
    else:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    modes: list[str] = []
    monkeypatch.setattr(wandb, "init", lambda **_: modes.append(wandb.setup().settings.mode) or Fake(Path.home()))
    assert (track(run_dir, TrackerConfig()), modes) == ([], [mode])


# ------------------------------------------------------------------------------------------------------------- failing


class Fake:
    """Stands for a W&B run; the method named `breaks` fails."""

    url = "https://wandb.example/run"

    def __init__(self, folder: Path, breaks: str = "") -> None:
        self.dir, self.breaks = str(folder), breaks
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def method(*_: Any, **__: Any) -> None:
            if name == self.breaks:
                raise OSError("the connection is gone")

        return method


@pytest.mark.parametrize("breaks", ["log", "save", "finish"])
def test_a_tracker_that_breaks_says_so_once(breaks: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: Fake(Path.home(), breaks))
    assert track(run_dir) == [
        "tracker=wandb: lora is not tracked in full (the connection is gone). The local files hold everything:"
        f" python -m llama_ft.report {run_dir} tracker=wandb tracker.upload=true sends it."
    ]


def test_a_file_where_wandbs_folder_should_be(run_dir: Path) -> None:
    (run_dir / "wandb").write_text("in the way")
    (sentence,) = track(run_dir)
    assert "is not tracked in full (" in sentence
    assert f"{run_dir}/wandb" in sentence


def test_online_without_a_key_asks_nothing_and_says_so(run_dir: Path) -> None:
    (sentence,) = track(run_dir, ONLINE)
    assert "(there is no API key: `wandb login` stores one)" in sentence
    assert not list(run_dir.glob("wandb/*run-*"))


def test_without_a_network_runs_are_tracked_offline_after_one_wait(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_run, "SECONDS_TO_CONNECT", 1)
    (sentence,) = track(run_dir, TrackerConfig(), "sweep")
    assert sentence.startswith("W&B cannot be used online (")
    assert sentence.endswith("): offline from now on; `wandb sync` sends the runs")
    assert_is_the_local_run(run_dir, "sweep")
    assert track(run_dir, TrackerConfig()) == []
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 2
    assert [file for file in run_dir.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()] == []
    assert capfd.readouterr() == ("", "")


def test_a_run_that_was_deleted_from_wandb_becomes_a_new_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "wandb" / "run-20260101_000000-abc123").mkdir(parents=True)
    (run_dir / "wandb" / "run-20260101_000000-abc123" / "run-abc123.wandb").touch()
    ids: list[str] = []

    def init(**about: Any) -> Fake:
        ids.append(about["id"])
        if about["id"] == "abc123":
            raise wandb.errors.CommError("run abc123 was previously created and deleted; try a new run name")
        return Fake(Path.home())

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert track(run_dir, ONLINE) == []
    assert len(ids) == 2


def services() -> list[int]:
    """Living processes of W&B's service that this one has started."""
    tasks = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    stats = {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")") for pid in tasks}
    return [pid for pid, (name, _, rest) in stats.items() if "(wandb-core" in name and rest.split()[0] != "Z"]


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_service_that_hangs_or_dies_is_said_and_left(
    sent: signal.Signals, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base, "SECONDS_TO_FINISH", 1)
    monkeypatch.setattr(wandb_run, "SECONDS_TO_STOP", 1)
    said: list[str] = []
    tracker = wandb_run.WandbRun(OFFLINE, base.Subject("lora", "train", run_dir), said.append)
    (service,) = services()
    os.kill(service, sent)
    try:
        tracker.step(STEPS[0])
        began = time.monotonic()
        tracker.finish(None)
        assert time.monotonic() - began < 10
        assert len(said) == 1
        assert "lora is not tracked in full (" in said[0]
        (run_dir / "next").mkdir()
        write_run(run_dir / "next")
        assert track(run_dir / "next") == []
        assert capfd.readouterr() == ("", "")
    finally:
        if sent is signal.SIGSTOP:
            os.kill(service, signal.SIGKILL)


# --------------------------------------------------------------------------------------------------------- TensorBoard


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def test_tensorboard_has_the_steps_the_config_and_the_result(run_dir: Path) -> None:
    for _ in range(2):  # the second takes the first one's place
        assert track(run_dir, TENSORBOARD) == []
    kept, result = events(run_dir), json.loads((run_dir / "result.json").read_text())
    assert [event.step for event in kept.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in kept.Scalars("loss")] == pytest.approx([8, 4, 8 / 3])
    assert [event.step for event in kept.Scalars("grad_norm")] == [1, 3]  # the second was skipped
    for key in ("runtime_s", "peak_memory_mib", "trainable_percent"):
        assert [(event.step, event.value) for event in kept.Scalars(f"result/{key}")] == [(3, result[key])]
    assert kept.Scalars("result/memory_mib.parameter")[0].value == 60
    (text,) = kept.Tensors("config")[0].tensor_proto.string_val
    assert json.loads(text.decode().removeprefix("```json").removesuffix("```"))["lora"]["rank"] == 16
    plugin = kept.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert (hparams["optim.lora"].bool_value, hparams["combination"].string_value) == (True, "lora")


def test_tensorboard_has_a_studys_numbers_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "kv_cache.md").write_text("| a table |")
    track_study(TENSORBOARD, "kv_cache", {"speedup": 2.5}, [tmp_path / "kv_cache.md", PICTURE], print)
    kept = events(tmp_path)
    assert kept.Scalars("result/speedup")[0].value == 2.5
    assert kept.Images("table2.png")[0].encoded_image_string == PICTURE.read_bytes()
    assert kept.Tensors("kv_cache.md")[0].tensor_proto.string_val == [b"| a table |"]


def test_without_its_package_tensorboard_is_a_line_that_says_what_to_install(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "llama_ft.tracking.tensorboard_run", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    (sentence,) = track(run_dir, TENSORBOARD)
    assert sentence.endswith("pip install tensorboard")
