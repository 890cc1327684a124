"""W&B runs made from local files, offline and over a server on loopback that takes what W&B sends."""

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run
from test_report import write
from test_tracking import (
    OFFLINE,
    ONLINE,
    WandbFile,
    assert_history_is,
    fresh_wandb,
    own,
    read_wandb,
    read_wandb_file,
    sends_again,
    track,
)

from llama_ft.config import (
    DataConfig,
    GpuConfig,
    ModelConfig,
    OptimConfig,
    TrackerConfig,
    TrackerMode,
    TrainConfig,
    UserError,
)
from llama_ft.tracking import wandb_run
from llama_ft.tracking.upload import upload_runs

KEY = "5ec2e75ec2e75ec2e75ec2e75ec2e75ec2e7abcd"
ROWS = {"baseline": "oom", "lora": "ok", "mp": "error"}  # the last was refused before it began


def make_sweep(folder: Path) -> Path:
    """A sweep's files, as runs with tracker=disabled leave them."""
    for name, status in ROWS.items():
        write(folder, name, status)
        if name != "mp":
            config = TrainConfig(
                model=ModelConfig(name="tiny"),
                optim=OptimConfig(lora=name == "lora"),
                data=DataConfig(name="sample"),
                gpu=GpuConfig(name="auto"),
            )
            (folder / name / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    lines = [{"step": step, "loss": 8.0 / step, "lr": 1e-3, "grad_norm": None, "memory_mib": 3.5} for step in (1, 2, 3)]
    (folder / "lora" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def assert_is_the_local_run(run_file: WandbFile, run_dir: Path) -> None:
    result = json.loads((run_dir / "result.json").read_text())
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert own(run_file.config) == config | {"combination": run_dir.name, "device": result["device"]}
    for key in result.keys() - set(wandb_run.NOT_IN_SUMMARY):
        assert run_file.summary[key] == result[key], key
    for name, file in wandb_run.FILES.items():
        if (run_dir / file).exists():
            assert (run_file.folder / name).read_bytes() == (run_dir / file).read_bytes()
    assert run_file.exit_code == (0 if result["status"] == "ok" else 1)
    assert (run_file.run.run_group, run_file.run.job_type) == (run_dir.parent.name, "train")


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A sweep that was not tracked, where nobody has logged in."""
    with fresh_wandb(tmp_path, monkeypatch):
        yield make_sweep(tmp_path / "sweep")


def upload(folder: Path, *names: str, config: TrackerConfig = OFFLINE, sweep: str | None = "sweep") -> list[str]:
    said: list[str] = []
    upload_runs(config, [folder / name for name in names], sweep, said.append)
    return said


# ------------------------------------------------------------------------------------------------------------- offline


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The command on a sweep that was not tracked, and that sweep."""
    folder = make_sweep(tmp_path_factory.mktemp("upload") / "sweep")
    arguments = ("tracker.upload=true", "tracker.mode=offline")
    return run("llama_ft.report", "sweep", *arguments, cwd=folder.parent, env={"HOME": str(folder.parent)}), folder


def test_a_sweep_that_was_not_tracked_becomes_wandb_runs(rebuilt: tuple[Any, Path]) -> None:
    done, folder = rebuilt
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("baseline", "lora"):
        assert_is_the_local_run(read_wandb(folder / name), folder / name)
    assert_history_is(read_wandb(folder / "lora").history, folder / "lora" / "metrics.jsonl")
    assert read_wandb(folder / "baseline").history == []


def test_the_sweeps_run_is_made_too(rebuilt: tuple[Any, Path]) -> None:
    run_file = read_wandb(rebuilt[1])
    table = run_file.json("media/table/table2_*.table.json")
    status = table["columns"].index("status")
    assert {row[0]: row[status] for row in table["data"]} == ROWS
    assert (run_file.run.run_group, run_file.run.job_type, run_file.exit_code) == ("sweep", "sweep", 0)


def test_it_is_said_how_to_send_them(rebuilt: tuple[Any, Path]) -> None:
    done, folder = rebuilt
    lines = done.stdout.splitlines()
    for name in ("baseline", "lora"):
        (line,) = (line for line in lines if line.startswith(f"{name}: `wandb sync "))
        place = folder.parent / line.removeprefix(f"{name}: `wandb sync ").removesuffix("` sends it")
        assert place.parent == folder / name / "wandb"
        assert list(place.glob("run-*.wandb"))
    assert "mp: no config.yaml, not sent" in lines


def test_a_run_sent_again_is_the_same_one(sweep: Path) -> None:
    upload(sweep, "lora")
    upload(sweep, "lora")
    track(sweep / "lora")
    files = list(sweep.glob("lora/wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 3
    assert len({read_wandb_file(file).run.run_id for file in files}) == 1


def test_a_row_sent_by_itself_stays_in_its_sweep(sweep: Path) -> None:
    upload(sweep, "lora", sweep=None)
    assert read_wandb(sweep / "lora").run.run_group == ""  # no report beside it
    (sweep / "table2.csv").touch()
    upload(sweep, "baseline", sweep=None)
    assert read_wandb(sweep / "baseline").run.run_group == "sweep"


# ------------------------------------------------------------------------------------------------------------- refused


def test_without_a_key_it_is_refused(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep")
    done = run("llama_ft.report", "sweep", "tracker.upload=true", cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: W&B gets nothing, without an API key, which `wandb login` keeps, it is offline")
    assert "tracker.mode=offline" in line
    assert not list(folder.rglob("wandb"))


def test_offline_by_the_environment_is_refused(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="WANDB_MODE=offline keeps it offline"):
        upload(sweep, "lora", config=TrackerConfig())


def test_disabled_is_refused(sweep: Path) -> None:
    with pytest.raises(UserError, match=r"tracker\.mode=disabled sends nothing"):
        upload(sweep, "lora", config=TrackerConfig(mode=TrackerMode.disabled))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n', "metrics.jsonl, line 2: "),
        ("config.yaml", "optim: {ga: [", "config.yaml cannot be read: "),
        ("config.yaml", "", "config.yaml is not the config of a run"),
    ],
)
def test_a_damaged_file_is_named(file: str, text: str, said: str, sweep: Path) -> None:
    (sweep / "lora" / file).write_text(text)
    with pytest.raises(UserError) as error:
        upload(sweep, "lora")
    assert f"{sweep / 'lora'}/{said}" in str(error.value)


# -------------------------------------------------------------------------------------------------------------- online


class Server(ThreadingHTTPServer):
    """Answers W&B as far as a run needs it, and keeps what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.refuses = self.is_gone = False
        self.keys: set[str] = set()
        self.variables: list[dict[str, Any]] = []  # of the mutations that make or change a run
        self.uploads: dict[str, bytes] = {}
        self.streamed: dict[str, list[Any]] = {}

    def handle_error(self, *_: Any) -> None:
        pass  # connections that W&B's service has left

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
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
        if self.server.is_gone:
            self.close_connection = True
            return
        if authorization := self.headers["Authorization"]:
            self.server.keys.add(base64.b64decode(authorization.removeprefix("Basic ")).decode())
        refusal = {"errors": [{"message": "user is not logged in"}]}
        answer = refusal if self.server.refuses else self.server.answer(self.path, body)
        text = json.dumps(answer).encode()
        self.send_response(401 if self.server.refuses else 200)
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
        wandb_run.end_session()
        server.shutdown()


def test_a_server_gets_all_of_a_run_and_no_file_gets_the_key(server: Server, sweep: Path, capfd: Any) -> None:
    (said,) = upload(sweep, "lora", config=TrackerConfig())
    result = json.loads((sweep / "lora" / "result.json").read_text())
    assert said.startswith(f"lora: {server.url}/someone/llama_ft/runs/")
    first = server.variables[0]
    assert (first["displayName"], first["groupName"], first["jobType"]) == ("lora", "sweep", "train")
    assert json.loads(first["config"])["optim"]["value"]["lora"] is True
    for name, file in wandb_run.FILES.items():
        assert server.uploads[name] == (sweep / "lora" / file).read_bytes()
    summary = json.loads(server.uploads["wandb-summary.json"])
    assert {key: summary[key] for key in ("status", "memory_mib", "trainable_percent")} == {
        key: result[key] for key in ("status", "memory_mib", "trainable_percent")
    }
    assert_history_is(server.streamed["wandb-history.jsonl"], sweep / "lora" / "metrics.jsonl")
    assert server.keys == {f"api:{KEY}"}
    assert [file for file in sweep.parent.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()] == []
    assert capfd.readouterr() == ("", "")


def test_a_server_that_refuses_the_key_makes_a_run_offline(server: Server, sweep: Path, capfd: Any) -> None:
    server.refuses = True
    (sentence,) = track(sweep / "lora", ONLINE)
    assert sentence.startswith("W&B cannot be used online (user is not logged in): offline from here on. ")
    assert sends_again(sentence) == sweep / "lora"
    assert read_wandb(sweep / "lora").exit_code == 0
    assert capfd.readouterr() == ("", "")


def test_a_server_that_refuses_the_key_ends_an_upload(server: Server, sweep: Path) -> None:
    server.refuses = True
    with pytest.raises(UserError, match=r"W&B failed at the start of baseline \(user is not logged in\)"):
        upload(sweep, "baseline", "lora", config=ONLINE)
    assert not list(sweep.glob("*/wandb/offline-run-*"))
    assert not (sweep / "lora" / "wandb").exists()


@pytest.mark.parametrize("how", ["refuses", "is_gone"])
def test_a_network_that_breaks_off_costs_the_tracking_alone(
    how: str, server: Server, sweep: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(wandb_run, "SECONDS_TO_FINISH", 1)
    said: list[str] = []
    tracker = wandb_run.start_run(
        ONLINE, sweep / "lora", yaml.safe_load((sweep / "lora" / "config.yaml").read_text()), "sweep", said.append
    )
    tracker.step({"step": 1, "loss": 1.0})
    setattr(server, how, True)
    tracker.finish({"status": "ok"})
    (sentence,) = said
    assert sentence.startswith("W&B failed at the end of lora (")
    assert "has only part of it" in sentence
    assert sends_again(sentence) == sweep
    assert capfd.readouterr() == ("", "")
