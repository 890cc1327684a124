"""A server on loopback that speaks as much of the Hugging Face hub's protocol as its client uses to download."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
LFS = (".safetensors", ".pth", ".bin", ".gguf")  # named by their SHA-256, the others by their git blob's id


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked for."""

    url: str = ""
    repos: dict[str, dict[str, Files]] = field(default_factory=dict)  # revisions' files by branch or tag
    gated: set[str] = field(default_factory=set)
    token: str | None = None  # with which the gated ones are open
    is_down: bool = False
    breaks: dict[str, int] = field(default_factory=dict)  # how often a file's connection breaks half way
    shortened: set[str] = field(default_factory=set)  # files of which less comes than was said
    asked: list[str] = field(default_factory=list)  # METHOD path, and the range where one is given
    n_bytes: dict[str, int] = field(default_factory=dict)  # sent, by file

    def files_of(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """The commit and its files, by its id or the name of a branch or tag."""
        found = ((commit_id(files), name, files) for name, files in self.repos[repo].items())
        return next(((commit, files) for commit, name, files in found if revision in (commit, name)), None)

    def names(self, method: str = "GET") -> list[str]:
        """The files asked for, each as often as it was."""
        lines = (re.fullmatch(rf"{method} /[^/]+/[^/]+/resolve/[^/]+/(\S+).*", line) for line in self.asked)
        return [match[1] for match in lines if match]


def commit_id(files: Files) -> str:
    """40 hex digits, of the content."""
    return hashlib.sha1("".join(name + etag(name, files[name]) for name in sorted(files)).encode()).hexdigest()


def etag(name: str, content: bytes) -> str:
    if name.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path} {wanted}".strip())
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        match = match or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        if self.hub.is_down or not match:
            return self.answer(503)
        repo, what, revision = match[1], match[2], match[3]
        if repo not in self.hub.repos:
            return self.answer(401, error="RepoNotFound")
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(403 if "Authorization" in self.headers else 401, error="GatedRepo")
        if (found := self.hub.files_of(repo, revision)) is None:
            return self.answer(404, error="RevisionNotFound")
        commit, files = found
        if what == "revision":
            return self.answer(200, {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if what == "tree":
            return self.answer(200, [entry(name, content) for name, content in files.items()])
        if match[4] not in files:
            return self.answer(404, error="EntryNotFound")
        return self.send_file(match[4], files[match[4]], commit, wanted)

    def answer(self, status: int, content: Any = None, error: str = "") -> None:
        body = json.dumps(content).encode() if self.command == "GET" and content is not None else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str, content: bytes, commit: str, wanted: str) -> None:
        hub, start = self.hub, int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
        part = content[start:-1] if name in hub.shortened else content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag(name, content)}"')
        if name.endswith(LFS):
            self.send_header("X-Linked-Etag", f'"{etag(name, content)}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.breaks.get(name, 0) > 0:
            hub.breaks[name] -= 1
            part = part[: len(part) // 2]
            self.close_connection = True
        hub.n_bytes[name] = hub.n_bytes.get(name, 0) + len(part)
        self.wfile.write(part)


def entry(name: str, content: bytes) -> dict[str, Any]:
    """A file in the listing of a revision."""
    lfs = {"lfs": {"oid": etag(name, content), "size": len(content), "pointerSize": 134}} if name.endswith(LFS) else {}
    return {"type": "file", "path": name, "size": len(content), "oid": etag("", content)} | lfs


@contextmanager
def served_hub() -> Iterator[Hub]:
    """A hub with nothing in it."""
    hub = Hub()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
