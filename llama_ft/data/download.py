"""A file downloaded once into a cache: resumed where it broke off, verified by its git blob id.

A git blob id is what `git hash-object FILE` prints: a file's repository shows it without a download.
"""

import fcntl
import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from llama_ft.config import UserError
from llama_ft.data.http_get import CHUNK_BYTES, NetworkError, chunks, get, in_a_line
from llama_ft.files import try_lock

TRIES = 5  # connections for one download
PAUSE_SECONDS = 2.0  # before the second of them, and so much longer before each one after
SECONDS_BETWEEN_LINES = 5.0  # of progress
BY_HAND = "get the file yourself and give data.path=FILE"


def fetch(url: str, git_blob_id: str | None, folder: Path, log: Callable[[str], None]) -> Path:
    """The file behind a URL, from the folder if it is there and whole, else downloaded into it.

    It keeps the last part of the URL's path as its name. What has come so far of a download lies beside it as
    NAME.part; a later call goes on from there. Of several processes one downloads, and the others wait for it.

    Args:
        git_blob_id: SHA-1 of "blob SIZE\\0" and the content, 40 hex digits; None accepts any content.
        say: called with lines for people about what happens.

    Raises:
        UserError: if the URL, the network, what came over it, or the folder is at fault.
    """
    name = _file_name(url)
    try:
        file = folder.expanduser() / name
        if not _is_whole(file, git_blob_id):
            file.parent.mkdir(parents=True, exist_ok=True)
            with _partial_file(file, log) as part:
                if not _is_whole(file, git_blob_id):  # still so, now that no other process downloads it
                    if file.exists():
                        log(f"{file} is damaged, its git blob id not {git_blob_id}: fetching it anew")
                    _Download(url, file, part, log).run(git_blob_id)
                    os.fsync(part.fileno())
                    Path(part.name).replace(file)
        elif git_blob_id is None:
            log(f"{file} was downloaded before; not verified, since data.git_blob_id is null")
    except BrokenPipeError:  # in `say`: whoever listened is gone
        raise
    except (OSError, RuntimeError) as error:  # the latter from expanduser(), where there is no home folder
        advice = f"name another folder with data.cache_dir=DIR, or {BY_HAND}"
        raise UserError(f"data.cache_dir={folder}: {in_a_line(error)}; {advice}") from error
    return file


def blob_id(stream: BinaryIO) -> str:
    """The git blob id of a whole stream: SHA-1 over "blob SIZE\\0" and the content, 40 hex digits."""
    digest = hashlib.sha1(b"blob %d\0" % stream.seek(0, os.SEEK_END), usedforsecurity=False)
    stream.seek(0)
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


class _Download:
    """One file on its way into its partial file."""

    def __init__(self, url: str, file: Path, part: BinaryIO, log: Callable[[str], None]) -> None:
        self._url, self._file, self._part, self._say = url, file, part, log

    def run(self, expected: str | None) -> None:
        """Make the partial file whole, whatever it holds already, and verify it by its git blob id.

        Raises:
            UserError: if the network or what came over it is at fault.
            OSError: if the file cannot be written.
        """
        name, verdict = self._file.name, "verified"
        if expected is None:
            self._part.truncate(0)  # nothing would tell whether an earlier part and this file fit together
            verdict = "not verified, since data.git_blob_id is null"
        in_pieces = self._receive()
        got = blob_id(self._part)
        if expected not in (None, got) and in_pieces:
            self._say(f"{name}: the pieces do not make the file expected; fetching it anew")
            self._part.truncate(0)
            self._receive()
            got = blob_id(self._part)
        size = f"{_mib(self._size())} MiB"
        if expected not in (None, got):
            self._part.truncate(0)
            wrong = f"{size} with git blob id {got}, expected data.git_blob_id={expected} (null accepts any file)"
            raise UserError(f"data.url={self._url}: not the file expected: got {wrong}. Nothing was kept; {BY_HAND}")
        self._say(f"{name}: {size} downloaded, {verdict}")

    def _receive(self) -> bool:
        """Append what is missing, going on where a connection broke. Whether the file came in pieces."""
        for tries in itertools.count(1):
            try:
                return self._receive_rest(self._size())
            except NetworkError as error:
                if tries == TRIES or not error.may_pass(first=tries == 1):
                    kept = "the same command goes on from what has come, or " if self._size() else ""
                    raise UserError(f"data.url={self._url}: {error}; {kept}{BY_HAND}") from error
                self._say(f"{self._file.name}: {error}; trying again")
                time.sleep(PAUSE_SECONDS * tries)
        raise AssertionError  # count() has no end

    def _receive_rest(self, start: int) -> bool:
        response = get(self._url, start)
        if response is None:
            return True
        with response:
            if start and response.status != 206:  # the whole file again
                self._part.truncate(0)
                start = 0
            self._copy(response, start)
        return start > 0

    def _copy(self, response: HTTPResponse, done: int) -> None:
        total = None if response.length is None else f"{_mib(done + response.length)} MiB"
        rest = f"the rest, from {_mib(done)} MiB on, of " if done else ""
        what = f"{rest}{self._file.name} ({total or 'size unknown'})"
        self._say(f"downloading {what} from {self._url} to {self._file.parent}")
        last_line = time.monotonic()
        for chunk in chunks(response):
            self._part.write(chunk)
            done += len(chunk)
            if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                self._say(f"{self._file.name}: {_mib(done)} {f'of {total}' if total else 'MiB'}")
                last_line = time.monotonic()

    def _size(self) -> int:
        return self._part.seek(0, os.SEEK_END)


@contextmanager
def _partial_file(file: Path, log: Callable[[str], None]) -> Iterator[BinaryIO]:
    """What has come so far of a file, open to read and append, for this process alone; removed if left empty.

    It is the partial file itself that is locked, not its folder, which may be one that a run holds for other reasons.
    """
    path = file.with_name(f"{file.name}.part")

    def is_at_path(part: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(part.fileno()), path.stat())
        except FileNotFoundError:
            return False

    while True:
        with path.open("a+b") as part:
            if not try_lock(part):
                log(f"another process is downloading {file}: waiting for it")
                fcntl.flock(part, fcntl.LOCK_EX)
            if not is_at_path(part):  # finished or removed by the process that was waited for
                continue
            try:
                yield part
            finally:
                if part.seek(0, os.SEEK_END) == 0 and is_at_path(part):
                    path.unlink()
            return


def _is_whole(file: Path, git_blob_id: str | None) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return git_blob_id in (None, blob_id(stream))


def _file_name(url: str) -> str:
    """The last part of a URL's path; a UserError if there is none, or the URL is not one of http or https."""
    try:
        parts = urlsplit(url)
        name = parts.path.rpartition("/")[2]
        whole = re.fullmatch(r"https?://[\w.:\[\]-]+/[!-~]+", url, re.ASCII) and parts.port != 0
    except ValueError:  # an impossible port or address
        whole, name = False, ""
    if not whole or name in ("", ".", ".."):
        raise UserError(f"data.url={url} is not allowed: it must be an http or https URL that ends in a file's name")
    return name


def _mib(n_bytes: int) -> str:
    """Megabytes of 2**20 bytes, without the unit."""
    n_mib = n_bytes / 2**20
    return f"{n_mib:,.0f}" if n_mib >= 10 else f"{n_mib:.1f}"
