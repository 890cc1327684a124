"""Downloading a data set into the cache, from a server on loopback."""

import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import unittest.mock
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import environment
from hydra import compose, initialize_config_dir

from llama_ft import cli
from llama_ft.config import DataConfig, UserError, config_dir
from llama_ft.data.dataset import SAMPLE_DIR, records_file
from llama_ft.data.download import blob_id, fetch
from llama_ft.system import Pace

CONTENT = json.dumps([{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(6000)]).encode()
OTHER = CONTENT[::-1]
UNVERIFIED = "not verified, since data.git_blob_id is null"
BY_HAND = "get the file yourself and give data.path=FILE"


def git_id(content: bytes) -> str:
    """As git defines it."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


ID = git_id(CONTENT)


class Handler(BaseHTTPRequestHandler):
    """Answers by the path; `served` holds the paths that were asked for."""

    served: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.served.append(self.path)
        if self.path == "/moved/records.json":
            self.send_response(302)
            self.send_header("Location", "/records.json")
            return self.end_headers()
        if self.path == "/absent.json":
            return self.send_error(404)
        content = OTHER if self.path == "/other.json" else CONTENT
        self.send_response(200)
        if self.path != "/unsized.json":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        is_cut = self.path == "/cut.json" or (self.path.startswith("/broken/") and len(self.served) == 1)
        self.wfile.write(content[: len(content) // 2] if is_cut else content)


@pytest.fixture
def served() -> list[str]:
    return []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, served: list[str]) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")  # loopback has nothing to do with the machine's proxy
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"served": served}))
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "deep"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def refused(url: str, cache: Path, git_blob_id: str | None = ID) -> str:
    with pytest.raises(UserError) as error:
        fetch(url, git_blob_id, str(cache), [].append)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_blob_ids_are_gits(tmp_path):
    known = {b"": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", b"hello\n": "ce013625030ba8dba906f756967f9e9ca394464a"}
    for content, expected in known.items():
        (tmp_path / "file").write_bytes(content)
        assert blob_id(tmp_path / "file") == expected


@pytest.mark.parametrize("git_blob_id", [ID, None])
@pytest.mark.parametrize("path", ["records.json", "moved/records.json", "unsized.json"])
def test_a_file_is_downloaded_once(server, served, cache, path, git_blob_id):
    lines: list[str] = []
    file = fetch(f"{server}/{path}?raw=true", git_blob_id, str(cache), lines.append)
    assert files(cache) == {file.name: CONTENT} == {path.rpartition("/")[2]: CONTENT}
    verified, size = "verified" if git_blob_id else UNVERIFIED, f"{len(CONTENT) / 2**20:.1f} MiB"
    assert lines == [f"downloading {server}/{path}?raw=true to {cache}", f"{file.name}: {size} downloaded, {verified}"]
    n_requests = len(served)
    assert fetch(f"{server}/{path}?raw=true", git_blob_id, str(cache), lines.append) == file
    assert lines[2:] == ([] if git_blob_id else [f"{file} was downloaded before; {UNVERIFIED}"])
    assert len(served) == n_requests


def test_a_connection_that_breaks_is_tried_again(server, served, cache):
    lines: list[str] = []
    fetch(f"{server}/broken/records.json", ID, str(cache), lines.append)
    assert files(cache) == {"records.json": CONTENT}
    assert re.fullmatch(r"records\.json: IncompleteRead.*; trying again", lines[1])
    assert len(served) == 2


def test_progress_is_shown(server, cache, monkeypatch):
    monkeypatch.setattr(Pace, "SECONDS", 0)
    lines: list[str] = []
    fetch(f"{server}/records.json", ID, str(cache), lines.append)
    size = f"{len(CONTENT) / 2**20:.1f}"
    assert lines[1] == f"0.1 of {size} MiB downloaded"
    assert lines[-2] == f"{size} of {size} MiB downloaded"


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"", OTHER])
def test_a_damaged_file_is_downloaded_again(server, cache, damaged):
    cache.mkdir(parents=True)
    (cache / "records.json").write_bytes(damaged)
    lines: list[str] = []
    fetch(f"{server}/records.json", ID, str(cache), lines.append)
    assert lines[0] == f"{cache / 'records.json'} is damaged: downloading it again"
    assert files(cache) == {"records.json": CONTENT}


def test_wrong_content_is_not_kept(server, cache):
    assert refused(f"{server}/other.json", cache) == (
        f"data.url={server}/other.json: expected a file with data.git_blob_id={ID} (null accepts any file),"
        f" got {git_id(OTHER)}; {BY_HAND}"
    )
    assert files(cache) == {}


@pytest.mark.parametrize(
    ("path", "reason"), [("absent.json", "404 Client Error: Not Found"), ("cut.json", "IncompleteRead.* more expected")]
)
@pytest.mark.parametrize("git_blob_id", [ID, None])
def test_server_that_fails(server, cache, path, reason, git_blob_id):
    text = refused(f"{server}/{path}", cache, git_blob_id)
    assert re.fullmatch(rf"data\.url={server}/{path}: {reason}.*; {BY_HAND}", text)
    assert files(cache) == {}


def test_no_server_and_no_such_host(server, cache, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/records.json"
    assert refused(url, cache) == f"data.url={url}: Connection refused; {BY_HAND}"
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", unittest.mock.Mock(side_effect=unknown))
    assert refused("http://host/a.json", cache) == f"data.url=http://host/a.json: Name or service not known; {BY_HAND}"
    assert files(cache) == {}


@pytest.mark.parametrize("url", ["ftp://host/a.json", "file:///a.json", "/a.json", "http://host", "http://host/a/", ""])
def test_urls_that_are_not_allowed(cache, url):
    expected = "is not allowed: it must be an http or https URL that ends in a file's name"
    assert refused(url, cache) == f"data.url={url} {expected}"
    assert not cache.exists()


def test_a_folder_that_cannot_be_made(server, served, tmp_path):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    advice = f"name another folder with data.cache_dir=DIR, or {BY_HAND}"
    assert refused(f"{server}/records.json", cache) == f"data.cache_dir={cache}: Not a directory; {advice}"
    assert served == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk(server, cache):
    cache.mkdir(parents=True)
    (cache / f".records.json.{os.getpid()}.tmp").symlink_to("/dev/full")  # where it is written to first
    text = refused(f"{server}/records.json", cache)
    assert text.startswith(f"data.cache_dir={cache}: No space left on device; name another folder")
    assert files(cache) == {}


def test_nobody_reads_the_lines(server, cache):
    with pytest.raises(BrokenPipeError):
        fetch(f"{server}/records.json", ID, str(cache), unittest.mock.Mock(side_effect=BrokenPipeError))


@pytest.mark.process
def test_processes_at_once_leave_one_whole_file(server, cache):
    code = "import sys; from llama_ft.data.download import fetch; print(fetch(*sys.argv[1:], log=lambda line: None))"
    command = [sys.executable, "-c", code, f"{server}/records.json", ID, str(cache)]
    start = functools.partial(subprocess.Popen, command, env=environment(), stdout=subprocess.PIPE, text=True)
    outputs = [process.communicate(timeout=60)[0] for process in [start(), start(), start()]]
    assert outputs == [f"{cache / 'records.json'}\n"] * 3
    assert files(cache) == {"records.json": CONTENT}


@pytest.mark.parametrize(("name", "first"), [("alpaca", None), ("alpaca_200", 200)])
def test_alpaca_is_the_official_file(name, first):
    cli.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        data = compose(config_name="train", overrides=[f"data={name}"]).data
    assert (data.name, data.first, data.path) == (name, first, None)
    assert data.url == "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
    assert data.git_blob_id == "3779ddbc040543ab1834ef216c983d6fcc06cc9a"
    assert data.cache_dir == "~/.cache/llama_ft"


def test_which_file_is_read(server, served, cache, tmp_path):
    data = DataConfig("alpaca", url=f"{server}/records.json", git_blob_id=ID, cache_dir=str(cache))
    assert records_file(replace(data, path=str(tmp_path / "own.json"))) == tmp_path / "own.json"
    assert records_file(DataConfig("sample")) == SAMPLE_DIR / "train.jsonl"
    assert served == []
    assert records_file(data) == cache / "records.json"
    assert served == ["/records.json"]
