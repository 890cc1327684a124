"""Downloads a file once into a cache, whole or not at all, and verifies it by its git blob id."""

import hashlib
from pathlib import Path
from urllib.parse import urlsplit

import requests

from llama_ft.config import UserError
from llama_ft.files import whole_file
from llama_ft.system import MIB, Log, Pace, first_cause

TRIES = 3  # if the connection breaks
TIMEOUT_SECONDS = 20.0  # to connect, and for each read
BY_HAND = "get the file yourself and give data.path=FILE"


def fetch(url: str, git_blob_id: str | None, cache_dir: str, log: Log) -> Path:
    """The file behind a URL: from the cache if it is there and verified, else downloaded into it.

    Args:
        git_blob_id: the output of `git hash-object FILE`, 40 hex digits; None accepts any content.
        cache_dir: the folder; the file's name is the last part of the URL's path.

    Raises:
        UserError: if the URL, the network, the content or the folder is at fault. No partial file is left.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    if not url.startswith(("http://", "https://")) or name in ("", ".."):
        raise UserError(f"data.url={url} is not allowed: it must be an http or https URL that ends in a file's name")
    try:
        file = Path(cache_dir).expanduser() / name
        if file.is_file():
            if git_blob_id in (None, blob_id(file)):
                if git_blob_id is None:
                    log(f"{file} was downloaded before; not verified, since data.git_blob_id is null")
                return file
            log(f"{file} is damaged: downloading it again")
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary:
            log(f"downloading {url} to {file.parent}")
            _download(url, temporary, file.name, log)
            actual = blob_id(temporary)
            if git_blob_id not in (None, actual):
                expected = f"data.git_blob_id={git_blob_id} (null accepts any file)"
                raise UserError(f"data.url={url}: expected a file with {expected}, got {actual}; {BY_HAND}")
            verdict = "verified" if git_blob_id else "not verified, since data.git_blob_id is null"
            log(f"{file.name}: {temporary.stat().st_size / MIB:.1f} MiB downloaded, {verdict}")
    except BrokenPipeError:  # raised by `log` if its output is closed
        raise
    except requests.RequestException as error:
        raise UserError(f"data.url={url}: {first_cause(error)}; {BY_HAND}") from error
    except (OSError, RuntimeError) as error:  # the latter if there is no home folder
        advice = f"name another folder with data.cache_dir=DIR, or {BY_HAND}"
        raise UserError(f"data.cache_dir={cache_dir}: {first_cause(error)}; {advice}") from error
    return file


def blob_id(file: Path) -> str:
    """The git blob id of a file: SHA-1 over "blob SIZE\\0" and the content, 40 hex digits."""
    header = b"blob %d\0" % file.stat().st_size
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def _download(url: str, file: Path, name: str, log: Log) -> None:
    for tries_left in reversed(range(TRIES)):
        try:
            return _receive(url, file, log)
        except requests.exceptions.ChunkedEncodingError as error:  # the connection broke
            if not tries_left:
                raise
            log(f"{name}: {first_cause(error)}; trying again")


def _receive(url: str, file: Path, log: Log) -> None:
    headers = {"Accept-Encoding": "identity"}  # so that Content-Length is the file's size
    with requests.get(url, stream=True, timeout=TIMEOUT_SECONDS, headers=headers) as response, file.open("wb") as out:
        response.raise_for_status()
        n_bytes = response.headers.get("Content-Length")
        total = f" of {int(n_bytes) / MIB:.1f}" if n_bytes else ""
        pace = Pace()
        for chunk in response.iter_content(2**16):
            out.write(chunk)
            if pace.is_due():
                log(f"{out.tell() / MIB:.1f}{total} MiB downloaded")
