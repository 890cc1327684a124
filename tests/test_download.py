"""Downloading a data set into the cache, from a server on loopback that behaves and misbehaves as told."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT, environment, run
from hydra import compose, initialize_config_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llama_ft import cli
from llama_ft.config import DataConfig, TrainConfig, UserError, config_dir
from llama_ft.data import download, http_get
from llama_ft.data.dataset import SAMPLE_DIR, records_file
from llama_ft.data.download import blob_id, fetch

NAME = "alpaca_data.json"
RECORDS = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(6000)]
CONTENT = json.dumps(RECORDS).encode()
HALF = len(CONTENT) // 2
OTHER = bytes(reversed(CONTENT))
BY_HAND = "data.path=FILE"


def git_id(content: bytes) -> str:
    """As git defines it, in one go."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


ID = git_id(CONTENT)


@dataclass
class Server:
    """What it does with each request in turn, the last for all that follow, and what it was asked."""

    port: int
    behaviours: list[str] = field(default_factory=lambda: ["whole"])
    requests: list[dict[str, str]] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)  # what hangs goes on

    def will(self, *behaviours: str) -> None:
        self.behaviours = list(behaviours)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{NAME}"

    @property
    def ranges(self) -> list[str | None]:
        return [request.get("Range") for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    """One method a behaviour."""

    state: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        state = self.state
        state.requests.append(dict(self.headers) | {"path": self.path})
        state.asked.set()
        behaviour = state.behaviours.pop(0) if len(state.behaviours) > 1 else state.behaviours[0]
        getattr(self, behaviour)()

    def answer(self, status: int, content: bytes, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def whole(self) -> None:
        self.answer(200, CONTENT, len(CONTENT))

    def ranged(self) -> None:
        """As a server that honours ranges does."""
        asked = self.headers.get("Range")
        if asked is None:
            return self.whole()
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            return self.answer(416, b"", 0, Content_Range=f"bytes */{len(CONTENT)}")
        rest = CONTENT[start:]
        last = len(CONTENT) - 1
        return self.answer(206, rest, len(rest), Content_Range=f"bytes {start}-{last}/{len(CONTENT)}")

    def cut(self) -> None:
        self.answer(200, CONTENT[:HALF], len(CONTENT))

    def cut_soon(self) -> None:
        """The next tenth of the file, and no more."""
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        tenth = CONTENT[start : start + len(CONTENT) // 10]
        rest = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        self.answer(206 if start else 200, tenth, len(CONTENT) - start, Content_Range=rest)

    def other_range(self) -> None:
        self.answer(206, CONTENT[5:], len(CONTENT) - 5, Content_Range=f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}")

    def not_found(self) -> None:
        self.send_error(404)

    def fail(self) -> None:
        self.send_error(500)

    def redirect(self) -> None:
        self.answer(302, b"", 0, Location="/elsewhere/file.bin")

    def redirect_to_itself(self) -> None:
        self.answer(302, b"", 0, Location=self.path)

    def redirect_to_file(self) -> None:
        self.answer(302, b"", 0, Location=f"file://{__file__}")

    def redirect_to_ftp(self) -> None:
        self.answer(302, b"", 0, Location=f"ftp://127.0.0.1:{self.state.port}/{NAME}")

    def other(self) -> None:
        self.answer(200, OTHER, len(OTHER))

    def no_length(self) -> None:
        self.answer(200, CONTENT, None)

    def chunked(self) -> None:
        self.chunks(CONTENT)
        self.wfile.write(b"0\r\n\r\n")

    def chunked_and_cut(self) -> None:
        self.chunks(CONTENT[:HALF])

    def chunks(self, content: bytes) -> None:
        self.protocol_version = "HTTP/1.1"
        self.answer(200, b"", None, Transfer_Encoding="chunked", Connection="close")
        for start in range(0, len(content), 10_000):
            piece = content[start : start + 10_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    def hang(self) -> None:
        self.state.release.wait(30)

    def hang_at_half(self) -> None:
        self.answer(200, CONTENT[:HALF], len(CONTENT))
        self.wfile.flush()
        self.state.release.wait(30)
        self.wfile.write(CONTENT[HALF:])

    def nonsense(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    def nothing(self) -> None:
        """Close the connection without a word."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")  # loopback has nothing to do with the machine's proxy
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    handler = type("BoundHandler", (Handler,), {})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.state = state = Server(http.server_address[1])
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield state
    state.release.set()
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "deep"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def part_of(cache: Path, content: bytes) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f"{NAME}.part"
    part.write_bytes(content)
    return part


def refused(url: str, git_blob_id: str | None, cache: Path, said: list[str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        fetch(url, git_blob_id, cache, ([] if said is None else said).append)
    text = str(error.value)
    assert "\n" not in text
    return text


# The git blob id


def test_known_blob_ids():
    assert blob_id(io.BytesIO(b"")) == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert blob_id(io.BytesIO(b"hello\n")) == "ce013625030ba8dba906f756967f9e9ca394464a"


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
@settings(derandomize=True, database=None, deadline=None, max_examples=15)
@example(b"x" * (2 * http_get.CHUNK_BYTES))
@example(b"x" * (http_get.CHUNK_BYTES + 1))
@example(b"a\r\nb\0")
@given(content=st.binary(max_size=300))
def test_blob_id_is_gits(content):
    command = ["git", "hash-object", "--no-filters", "--stdin"]
    done = subprocess.run(command, input=content, capture_output=True, check=True)
    stream = io.BytesIO(content)
    stream.read(7)  # wherever it stands
    assert blob_id(stream) == done.stdout.decode().strip() == git_id(content)


# What works


@pytest.mark.parametrize("behaviour", ["whole", "no_length", "chunked", "redirect"])
def test_download_is_done_once(server, cache, behaviour):
    server.will(behaviour, "whole")
    said: list[str] = []
    file = fetch(server.url, ID, cache, said.append)
    assert file == cache / NAME
    assert files(cache) == {NAME: CONTENT}
    n_requests = len(server.requests)
    assert n_requests == (2 if behaviour == "redirect" else 1)
    assert all(request["User-Agent"].startswith("llama_ft/") for request in server.requests)
    assert server.ranges == [None] * n_requests
    assert said[0].startswith(f"downloading {NAME} (")
    assert said[0].endswith(f"from {server.url} to {cache}")
    assert said[-1] == f"{NAME}: 0.3 MiB downloaded, verified"
    said.clear()
    assert fetch(server.url, ID, cache, said.append) == file
    assert (len(server.requests), said) == (n_requests, [])


def test_cached_file_needs_neither_network_nor_a_writable_folder(cache):
    part_of(cache, CONTENT).rename(cache / NAME)
    cache.chmod(0o555)
    try:
        assert fetch(f"http://127.0.0.1:9/{NAME}?raw=true", ID, cache, pytest.fail) == cache / NAME
    finally:
        cache.chmod(0o755)
    assert files(cache) == {NAME: CONTENT}


@pytest.mark.parametrize(("behaviour", "size"), [("whole", "(0.3 MiB)"), ("no_length", "(size unknown)")])
def test_progress_is_said(server, cache, monkeypatch, behaviour, size):
    monkeypatch.setattr(download, "SECONDS_BETWEEN_LINES", 0)
    server.will(behaviour)
    said: list[str] = []
    fetch(server.url, ID, cache, said.append)
    assert size in said[0]
    ending = " of 0.3 MiB" if behaviour == "whole" else " MiB"
    assert len(said) >= 3
    assert all(line.startswith(f"{NAME}: 0.") and line.endswith(ending) for line in said[1:-1])
    assert said[-2] == f"{NAME}: 0.3{ending}"


def test_sizes_are_said_in_mib():
    assert [download._mib(n) for n in (0, 300_000, 9 * 2**20, 22_773_992)] == ["0.0", "0.3", "9.0", "22"]


def test_progress_is_not_said_too_often(server, cache):
    said: list[str] = []
    fetch(server.url, ID, cache, said.append)
    assert len(said) == 2


def test_home_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(server.url, ID, Path("~/.cache/llama_ft"), [].append) == tmp_path / ".cache" / "llama_ft" / NAME


def test_proxy_of_the_environment_is_used(server, cache, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    url = f"http://data.invalid/{NAME}"
    fetch(url, ID, cache, [].append)
    assert [request["path"] for request in server.requests] == [url]


# Resuming


def test_part_is_resumed(server, cache):
    part_of(cache, CONTENT[:1000])
    server.will("ranged")
    said: list[str] = []
    fetch(server.url, ID, cache, said.append)
    assert server.ranges == ["bytes=1000-"]
    assert files(cache) == {NAME: CONTENT}
    assert said[0].startswith("downloading the rest, from 0.0 MiB on")


@pytest.mark.parametrize("behaviour", ["whole", "other_range"])
def test_server_without_proper_ranges_sends_all_of_it(server, cache, behaviour):
    part_of(cache, CONTENT[:1000])
    server.will(behaviour, "whole")
    fetch(server.url, ID, cache, [].append)
    assert server.ranges == ["bytes=1000-"] + [None] * (behaviour == "other_range")
    assert files(cache) == {NAME: CONTENT}


def test_part_that_is_all_of_it(server, cache):
    part_of(cache, CONTENT)
    server.will("ranged")
    fetch(server.url, ID, cache, [].append)
    assert server.ranges == [f"bytes={len(CONTENT)}-"]
    assert files(cache) == {NAME: CONTENT}


@pytest.mark.parametrize("content", [OTHER[:1000], OTHER, CONTENT + b"more"], ids=["begin", "whole", "too long"])
def test_wrong_part_is_found_out(server, cache, content):
    part_of(cache, content)
    server.will("ranged")
    said: list[str] = []
    fetch(server.url, ID, cache, said.append)
    assert server.ranges == [f"bytes={len(content)}-", None]
    assert files(cache) == {NAME: CONTENT}
    assert any("fetching it anew" in line for line in said)


def test_wrong_part_of_a_wrong_file_is_fetched_anew_only_once(server, cache):
    part_of(cache, b"x")
    server.will("ranged")
    assert ID in refused(server.url, git_id(b"another"), cache)
    assert server.ranges == ["bytes=1-", None]
    assert files(cache) == {}


@pytest.mark.parametrize(("behaviour", "kept"), [("cut", HALF), ("chunked_and_cut", HALF)])
def test_broken_connection_is_resumed(server, cache, behaviour, kept):
    server.will(behaviour, "ranged")
    said: list[str] = []
    fetch(server.url, ID, cache, said.append)
    assert server.ranges == [None, f"bytes={kept}-"]
    assert files(cache) == {NAME: CONTENT}
    assert any("trying again" in line for line in said)


def test_connection_that_breaks_again_and_again(server, cache):
    server.will("cut_soon")
    said: list[str] = []
    text = refused(server.url, ID, cache, said)
    tenth = len(CONTENT) // 10
    assert server.ranges == [None] + [f"bytes={n * tenth}-" for n in range(1, download.TRIES)]
    assert files(cache) == {f"{NAME}.part": CONTENT[: download.TRIES * tenth]}
    assert f"data.url={server.url}: the connection ended early; the same command goes on" in text
    assert BY_HAND in text
    server.will("ranged")
    fetch(server.url, ID, cache, said.append)
    assert server.ranges[-1] == f"bytes={download.TRIES * tenth}-"
    assert files(cache) == {NAME: CONTENT}


@pytest.mark.parametrize("behaviour", ["fail", "nothing", "nonsense", "hang", "hang_at_half"])
def test_what_may_pass_is_tried_again(server, cache, monkeypatch, behaviour):
    monkeypatch.setattr(http_get, "TIMEOUT_SECONDS", 0.3)
    server.will(behaviour, "ranged")
    said: list[str] = []
    fetch(server.url, ID, cache, said.append)
    assert server.ranges == [None, f"bytes={HALF}-" if behaviour == "hang_at_half" else None]
    assert files(cache) == {NAME: CONTENT}
    assert len([line for line in said if "trying again" in line]) == 1


def test_interrupted_download_is_resumed(server, cache, monkeypatch):
    monkeypatch.setattr(download, "SECONDS_BETWEEN_LINES", 0)

    def interrupt(line: str) -> None:
        if " of " in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server.url, ID, cache, interrupt)
    (part,) = files(cache).values()
    assert 0 < len(part) < len(CONTENT)
    assert part == CONTENT[: len(part)]
    server.will("ranged")
    fetch(server.url, ID, cache, [].append)
    assert server.ranges == [None, f"bytes={len(part)}-"]
    assert files(cache) == {NAME: CONTENT}


# Verifying


def test_wrong_content_is_not_kept(server, cache):
    server.will("other")
    text = refused(server.url, ID, cache)
    assert f"data.url={server.url}" in text
    assert git_id(OTHER) in text
    assert f"data.git_blob_id={ID}" in text
    assert "Nothing was kept" in text
    assert BY_HAND in text
    assert len(server.requests) == 1
    assert files(cache) == {}


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"", CONTENT[:HALF] + b"?" + CONTENT[HALF + 1 :]])
def test_damaged_file_is_fetched_anew(server, cache, damaged):
    part_of(cache, damaged).rename(cache / NAME)
    said: list[str] = []
    fetch(server.url, ID, cache, said.append)
    assert "is damaged" in said[0]
    assert str(cache / NAME) in said[0]
    assert server.ranges == [None]
    assert files(cache) == {NAME: CONTENT}


def test_any_content_is_accepted_where_no_id_is_given(server, cache):
    part_of(cache, b"of something else")
    server.will("cut", "ranged")
    said: list[str] = []
    fetch(server.url, None, cache, said.append)
    assert server.ranges == [None, f"bytes={HALF}-"]  # not the earlier part, which might be of another file
    assert files(cache) == {NAME: CONTENT}
    assert "not verified" in said[-1]
    said.clear()
    fetch(server.url, None, cache, said.append)
    assert len(server.requests) == 2
    assert len(said) == 1
    assert "not verified" in said[0]


# What fails


@pytest.mark.parametrize(
    ("behaviour", "reason", "n_requests"),
    [
        ("not_found", "HTTP Error 404: Not Found", 1),
        ("fail", "HTTP Error 500: Internal Server Error", download.TRIES),
        ("redirect_to_itself", "HTTP Error 302: .*infinite loop", None),
        ("redirect_to_file", "HTTP Error 302: .*not allowed", 1),
        ("redirect_to_ftp", "unknown url type: ftp", 1),
        ("nothing", "Remote end closed connection", download.TRIES),
        ("nonsense", "SSH-2.0", download.TRIES),
        ("hang", "timed out", download.TRIES),
        ("other_range", "asked for the whole file", download.TRIES),
    ],
)
def test_server_that_fails(server, cache, monkeypatch, behaviour, reason, n_requests):
    monkeypatch.setattr(http_get, "TIMEOUT_SECONDS", 0.1)
    server.will(behaviour)
    with pytest.raises(UserError, match=f"^data.url={server.url}: .*{reason}.*{BY_HAND}$"):
        fetch(server.url, ID, cache, [].append)
    assert n_requests in (None, len(server.requests))
    assert files(cache) == {}


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_no_server_and_unknown_host(server, cache, closed_port, monkeypatch):
    def resolve(host: str, *args: Any, **options: Any) -> Any:
        if host == "data.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return getaddrinfo(host, *args, **options)

    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    hosts = {f"127.0.0.1:{closed_port}": "Connection refused", "data.invalid": "Name or service not known"}
    for host, reason in hosts.items():
        said: list[str] = []
        assert refused(f"http://{host}/{NAME}", ID, cache, said) == (
            f"data.url=http://{host}/{NAME}: {reason}; get the file yourself and give data.path=FILE"
        )
        assert said == []  # and at once
    assert files(cache) == {}


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/a.json",
        "file:///etc/passwd",
        "/etc/passwd",
        "a.json",
        "http://",
        "http:///a.json",
        "http://127.0.0.1",
        "http://127.0.0.1/",
        "http://127.0.0.1/folder/?file=a.json",
        "http://127.0.0.1/..",
        "http://127.0.0.1/a b.json",
        "http://127.0.0.1/ä.json",
        "http://127.0.0.1/a.json\r\nX: y",
        "http://user:secret@127.0.0.1/a.json",
        "http://127.0.0.1:99999/a.json",
        "http://127.0.0.1:port/a.json",
        "http://[::1/a.json",
        "",
    ],
)
def test_urls_that_are_not_allowed(cache, url):
    with pytest.raises(UserError) as error:
        fetch(url, ID, cache, pytest.fail)
    assert str(error.value).startswith(f"data.url={url} is not allowed: it must be an http or https URL")
    assert not cache.exists()


@pytest.mark.parametrize("host", ["a..b", "[::1]:1"])
def test_hosts_that_cannot_be(server, cache, host):
    assert f"data.url=http://{host}/a.json: " in refused(f"http://{host}/a.json", ID, cache)
    assert files(cache) == {}


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    text = refused(server.url, ID, cache)
    assert text.startswith(f"data.cache_dir={cache}: Not a directory; name another folder with data.cache_dir=DIR")
    assert BY_HAND in text
    assert server.requests == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_is_read_only(server, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o555)
    assert f"data.cache_dir={cache}: Permission denied" in refused(server.url, ID, cache)
    assert server.requests == []


def test_folder_of_the_files_name(server, cache):
    (cache / NAME).mkdir(parents=True)
    assert f"data.cache_dir={cache}: Is a directory" in refused(server.url, ID, cache)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_disk(server, cache):
    cache.mkdir(parents=True)
    (cache / f"{NAME}.part").symlink_to("/dev/full")
    text = refused(server.url, ID, cache)
    assert text.startswith(f"data.cache_dir={cache}: No space left on device; name another folder")
    assert BY_HAND in text
    assert not (cache / NAME).exists()


def test_no_home_folder(server, monkeypatch):
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    assert "data.cache_dir=~/cache: Could not determine home" in refused(server.url, ID, Path("~/cache"))


def test_a_listener_that_is_gone_is_no_fault_of_the_folder(server, cache):
    def gone(line: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        fetch(server.url, ID, cache, gone)


# Several processes at once

FETCH = """
import signal, sys
from pathlib import Path
from llama_ft.data.download import fetch
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may have been told to ignore it
print(fetch(sys.argv[1], sys.argv[2], Path(sys.argv[3]), lambda line: print(line, flush=True)))
"""


def start(server: Server, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, server.url, ID, str(cache)]
    return subprocess.Popen(command, cwd=CHECKOUT, env=environment(), stdout=subprocess.PIPE, text=True)


def test_two_processes_download_once(server, cache):
    server.will("hang_at_half", "whole")
    with start(server, cache) as first:
        assert server.asked.wait(30)
        with start(server, cache) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == f"another process is downloading {cache / NAME}: waiting for it\n"
            server.release.set()
            outputs = [process.communicate(timeout=30)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert [output.splitlines()[-1] for output in outputs] == [str(cache / NAME)] * 2
    assert len(server.requests) == 1
    assert files(cache) == {NAME: CONTENT}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=lambda end: end.name)
def test_who_waits_takes_over_from_a_process_that_ends(server, cache, end):
    server.will("hang_at_half", "ranged")
    with start(server, cache) as first:
        assert server.asked.wait(30)
        with start(server, cache) as second:
            assert second.stdout is not None
            second.stdout.readline()
            deadline = time.monotonic() + 10
            while not files(cache)[f"{NAME}.part"] and time.monotonic() < deadline:
                time.sleep(0.02)
            first.send_signal(end)
            assert second.communicate(timeout=30)[0].splitlines()[-1] == str(cache / NAME)
    assert first.returncode != 0
    assert server.ranges[0] is None
    assert server.ranges[1] is not None
    assert files(cache) == {NAME: CONTENT}


# Through the configuration and the command


def composed(*overrides: str) -> TrainConfig:
    cli.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        config = OmegaConf.to_object(compose(config_name="train", overrides=list(overrides)))
    assert isinstance(config, TrainConfig)
    return config


@pytest.mark.parametrize(("name", "first"), [("alpaca", None), ("alpaca_200", 200)])
def test_alpaca_is_the_official_file(name, first):
    data = composed(f"data={name}").data
    assert (data.name, data.first, data.path) == (name, first, None)
    assert data.url == "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
    assert data.git_blob_id == "3779ddbc040543ab1834ef216c983d6fcc06cc9a"
    assert data.cache_dir == "~/.cache/llama_ft"


def test_where_it_is_kept_is_not_in_the_hash(tmp_path):
    config = composed("data=alpaca")
    elsewhere = replace(config, data=replace(config.data, cache_dir=str(tmp_path)))
    other = replace(config, data=replace(config.data, git_blob_id=ID))
    assert elsewhere.hash() == config.hash() != other.hash()


def test_which_file_is_read(server, cache, tmp_path):
    data = DataConfig("alpaca", url=server.url, git_blob_id=ID, cache_dir=str(cache))
    assert records_file(replace(data, path=str(tmp_path / "own.json"))) == tmp_path / "own.json"
    assert records_file(DataConfig("sample")) == SAMPLE_DIR / "train.jsonl"
    assert server.requests == []
    assert records_file(data) == cache / NAME
    assert len(server.requests) == 1


def train(url: str, cache: Path, folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    data = ("data=alpaca", f"data.url={url}", f"data.git_blob_id={ID}", f"data.cache_dir={cache}")
    settings = ("training.max_samples=4", "training.epochs=1", "tracker=disabled", f"hydra.run.dir={folder}")
    done = run("llama_ft.train", *data, *settings, cwd=folder.parent)
    return done, json.loads((folder / "result.json").read_text())


def test_two_runs_with_one_download(server, cache, tmp_path):
    first, result = train(server.url, cache, tmp_path / "first")
    assert (first.returncode, result["status"], result["samples"]) == (0, "ok", 4), first.stderr
    assert f"downloading {NAME} (0.3 MiB) from {server.url} to {cache}" in first.stdout
    second, result = train(server.url, cache, tmp_path / "second")
    assert (second.returncode, result["status"], result["data"]) == (0, "ok", "alpaca"), second.stderr
    assert "download" not in second.stdout
    assert len(server.requests) == 1
    assert files(cache) == {NAME: CONTENT}


def test_run_without_a_server(server, cache, tmp_path, closed_port):
    url = f"http://127.0.0.1:{closed_port}/{NAME}"
    done, result = train(url, cache, tmp_path / "run")
    assert (done.returncode, result["status"]) == (1, "error")
    assert result["error"] == f"data.url={url}: Connection refused; get the file yourself and give data.path=FILE"
    assert result["error"] in done.stderr
    assert "Traceback" not in done.stdout + done.stderr + (tmp_path / "run" / "train.log").read_text()
    assert files(cache) == {}
