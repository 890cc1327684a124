"""Runs sent from their local files: to W&B offline, to TensorBoard, and to a W&B server on loopback."""

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from helpers.tracked import (
    assert_history_is,
    assert_is_the_local_run,
    assert_table_is,
    fresh_wandb,
    read_wandb,
    track,
    write_run,
)

from llama_ft.config import TrackerConfig, TrackerKind, TrackerMode, UserError
from llama_ft.config.groups import UploadConfig
from llama_ft.tracking import upload_runs, wandb_run
from llama_ft.tracking.base import RUN_FILES

KEY = "5ec2e75ec2e75ec2e75ec2e75ec2e75ec2e7abcd"
OFFLINE = UploadConfig(mode=TrackerMode.offline)


def make_sweep(folder: Path) -> Path:
    """A sweep's files, as runs with tracker=disabled leave them; the last was refused before it began."""
    for name, status in (("baseline", "oom"), ("lora", "ok"), ("mp", "error")):
        (folder / name).mkdir(parents=True)
        write_run(folder / name, status, TrackerConfig(TrackerKind.disabled, project="told"))
    (folder / "mp" / "config.yaml").unlink()
    return folder


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A sweep that was not tracked, where nobody has logged in."""
    with fresh_wandb(tmp_path / "home", monkeypatch):
        yield make_sweep(tmp_path / "sweep")


def upload(folder: Path, *names: str, config: UploadConfig = OFFLINE, sweep: str | None = "sweep") -> list[str]:
    said: list[str] = []
    upload_runs(config, [folder / name for name in names], sweep, said.append)
    return said


@pytest.mark.process
def test_the_command_makes_wandb_runs_of_a_sweep_that_was_not_tracked(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep")
    arguments = ("tracker.upload=true", "tracker.mode=offline")
    done = run("llama_ft.report", "sweep", *arguments, cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("baseline", "lora"):
        assert_is_the_local_run(folder / name, "sweep")
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{name}: `wandb sync "))
        assert list(Path(line.partition("sync ")[2].removesuffix("` sends it")).glob("run-*.wandb"))
    assert "mp: no config.yaml, not sent" in done.stdout.splitlines()
    table = read_wandb(folder)
    assert_table_is(table, folder / "table2.csv")
    assert (table.run.run_group, table.run.job_type, table.run.project) == ("sweep", "sweep", "told")


def test_a_run_sent_again_is_the_same_one(sweep: Path) -> None:
    track(sweep / "lora")
    for _ in range(2):
        upload(sweep, "lora")
    files = list(sweep.glob("lora/wandb/offline-run-*/run-*.wandb"))
    assert (len(files), len({file.name for file in files})) == (3, 1)


@pytest.mark.process
def test_a_row_sent_by_itself_stays_in_its_sweep_and_project(sweep: Path) -> None:
    upload(sweep, "lora", sweep=None, config=UploadConfig(mode=TrackerMode.offline, project="other"))
    (sweep / "table2.csv").touch()
    upload(sweep, "baseline", sweep=None)
    sent = [read_wandb(sweep / name).run for name in ("lora", "baseline")]
    assert [(run.run_group, run.project) for run in sent] == [("", "other"), ("sweep", "told")]


def test_runs_go_to_tensorboard_too(sweep: Path) -> None:
    (said,) = upload(sweep, "lora", config=UploadConfig(TrackerKind.tensorboard))
    assert said == f"lora: `tensorboard --logdir {sweep / 'lora'}` shows it"
    assert len(list((sweep / "lora").glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize(
    ("config", "variable", "said"),
    [
        (UploadConfig(TrackerKind.disabled), None, "with tracker=disabled sends nothing"),
        (UploadConfig(), "offline", "WANDB_MODE=offline keeps W&B from getting anything"),
        (UploadConfig(), None, "there is no API key: `wandb login` stores one"),
    ],
)
def test_what_would_send_nothing_is_refused(
    config: UploadConfig, variable: str | None, said: str, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    with pytest.raises(UserError, match=said):
        upload(sweep, "lora", config=config)
    assert not list(sweep.rglob("*run-*"))


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.yaml"])
def test_a_damaged_file_is_named(file: str, sweep: Path) -> None:
    (sweep / "lora" / file).write_text("{\n")
    with pytest.raises(UserError, match=str(sweep / "lora" / file)):
        upload(sweep, "lora")


# -------------------------------------------------------------------------------------------------------------- online


class Server(ThreadingHTTPServer):
    """Answers W&B as far as a run needs it, and keeps what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status = 200
        self.keys: set[str] = set()
        self.variables: list[dict[str, Any]] = []  # of the mutations that make or change a run
        self.uploads: dict[str, bytes] = {}
        self.streamed: dict[str, list[Any]] = {}

    def handle_error(self, *_: Any) -> None:
        pass  # connections that W&B's service has left

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if self.status != 200:
            return {"errors": [{"message": "user is not logged in"}]}
        if path == "/graphql":
            query = json.loads(body)
            return {"data": self.data(query["query"], query.get("variables") or {})}
        if path.startswith("/upload/"):
            self.uploads[path.removeprefix("/upload/")] = body
        elif path.endswith("/file_stream"):
            for name, part in json.loads(body).get("files", {}).items():
                self.streamed.setdefault(name, []).extend(json.loads(line) for line in part["content"])
        return {}

    def data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            self.variables.append(variables)
            project = {"id": "2", "name": variables["project"], "entity": {"id": "3", "name": "someone"}}
            bucket = {"id": "1", "name": variables["name"], "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    """A request: its body is read, however it is sent, and answered with JSON."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        if authorization := self.headers["Authorization"]:
            self.server.keys.add(base64.b64decode(authorization.removeprefix("Basic ")).decode())
        text = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, sweep: Path) -> Iterator[Server]:
    """A W&B server, to which someone has a key."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        wandb_run.stop()
        server.shutdown()


def test_a_server_gets_all_of_a_run_and_no_file_gets_the_key(server: Server, sweep: Path, capfd: Any) -> None:
    (said,) = upload(sweep, "lora", config=UploadConfig())
    assert said.startswith(f"lora: {server.url}/someone/told/runs/")
    first = server.variables[0]
    assert (first["displayName"], first["groupName"], first["jobType"]) == ("lora", "sweep", "train")
    assert json.loads(first["config"])["optim"]["value"]["lora"] is True
    for name, file in RUN_FILES.items():
        assert server.uploads[name] == (sweep / "lora" / file).read_bytes()
    result, summary = json.loads((sweep / "lora" / "result.json").read_text()), server.uploads["wandb-summary.json"]
    for key in ("status", "memory_mib", "trainable_percent"):
        assert json.loads(summary)[key] == result[key]
    assert_history_is(server.streamed["wandb-history.jsonl"], sweep / "lora" / "metrics.jsonl")
    assert server.keys == {f"api:{KEY}"}
    assert [file for file in sweep.parent.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()] == []
    assert capfd.readouterr() == ("", "")


def test_a_server_that_refuses_the_key_ends_an_upload(server: Server, sweep: Path) -> None:
    server.status = 401
    with pytest.raises(UserError, match=r"baseline is not tracked in full \(user is not logged in\)"):
        upload(sweep, "baseline", "lora", config=UploadConfig())
    assert not (sweep / "lora" / "wandb").exists()


def test_a_server_that_is_gone_in_the_end_costs_the_tracking_alone(
    server: Server, sweep: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(wandb_run, "SECONDS_TO_UPLOAD", 1)
    monkeypatch.setattr(wandb_run, "SECONDS_TO_STOP", 1)
    monkeypatch.setattr(wandb_run.WandbRun, "_step", lambda *_: setattr(server, "status", 503))
    (sentence,) = track(sweep / "lora", TrackerConfig(), "sweep")
    assert "lora is not tracked in full (" in sentence
    assert capfd.readouterr() == ("", "")
