"""Models by name from the Hugging Face hub: `hub:ORG/NAME[@REVISION]`, or one file of it, `hub:ORG/NAME/FILE.gguf`.

`huggingface_hub` downloads, resumes and caches. Its settings of token, cache, endpoint and offline mode apply: HF_TOKEN
or `hf auth login`, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE. Downloads and their paths are printed on standard error.
"""

import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from llama_ft.config import TOKENIZER_FILES, UserError
from llama_ft.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CHAT_TEMPLATE,
    HF_CONFIG,
    INDEX_FILE,
    META_PARAMS,
    WEIGHTS_FILE,
    read_json,
    unread_hint,
)
from llama_ft.system import MIB, first_cause

T = TypeVar("T")
NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([^@]+\.gguf))?(?:@(.+))?")
SMALL_FILES = f"""
    {HF_CONFIG} {META_PARAMS} {INDEX_FILE} {ADAPTER_CONFIG_FILE} generation_config.json {CHAT_TEMPLATE}
    tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
""".split()  # all but the weights
NEEDED = {"adapter": (ADAPTER_CONFIG_FILE,), "tokenizer": TOKENIZER_FILES}  # any one of them; by default a sizes file
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_hub_name(name: object) -> bool:
    """Return True for a name on the hub."""
    return str(name).startswith("hub:")


@cache
def fetch(key: str, name: str) -> Path:
    """Fetch a repository without its weights, or the one file that is named; return its path in the cache.

    For the key `adapter` the weights are included; for `tokenizer` the path is a file's. Any failure is a UserError.
    """
    repo, file, revision = _parts(key, name)
    needed = NEEDED.get(key, (HF_CONFIG, META_PARAMS))
    with _explained(key, name, repo):
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.utils.tqdm import tqdm

        if file is not None:
            path = Path(hf_hub_download(repo, file, revision=revision))
            folder = path.parents[file.count("/")]
        else:
            wanted = [*SMALL_FILES, ADAPTER_FILE] if key == "adapter" else SMALL_FILES
            no_bar: Any = partial(tqdm, disable=True)
            path = folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, tqdm_class=no_bar))
    if file is None:
        files = _files(repo, folder)
        if (found := next((each for each in needed if each in files), None)) is None:
            raise UserError(f"{key}={name} contains no {' or '.join(needed)}{unread_hint(f'hub:{repo}', files)}")
        path = folder / found if key == "tokenizer" else folder
    print(f"{key}={name} is {path} (revision {folder.name[:7]})", file=sys.stderr)
    return path


@cache
def fetch_weights(key: str, name: str) -> Path:
    """Like `fetch`, with those weight files that will be read."""
    folder, repo = fetch(key, name), _parts(key, name)[0]
    if folder.is_file() or key in NEEDED:
        return folder
    files = _files(repo, folder)
    wanted = [each for each in files if re.fullmatch(r"consolidated\.\d+\.pth", each)]
    if WEIGHTS_FILE in files:
        wanted = [WEIGHTS_FILE]
    elif INDEX_FILE in files:
        weight_map = read_json(folder / INDEX_FILE, "which file holds which tensor").get("weight_map")
        wanted = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not wanted:
        raise UserError(f"{key}={name} contains no weights that can be read{unread_hint(f'hub:{repo}', files)}")
    if missing := [each for each in wanted if not (folder / each).is_file()]:
        size, free = sum(files.get(each, 0) for each in missing), shutil.disk_usage(folder).free
        if size > free:
            room = f"{size / MIB:,.0f} MiB are needed, and {free / MIB:,.0f} MiB are free in {folder}"
            raise UserError(f"{key}={name}: {room}: HF_HOME=DIR names another place for the cache")
        print(f"{key}={name}: downloading {size / MIB:,.0f} MiB ({', '.join(missing)})", file=sys.stderr)
        with _explained(key, name, repo):
            from huggingface_hub import hf_hub_download

            for each in missing:  # not in threads: Ctrl-C ends it at once
                hf_hub_download(repo, each, revision=folder.name)
    return folder


def local(key: str, name: T) -> T | Path:
    """Return the path of a name on the hub, as `fetch_weights` does; anything else is returned unchanged."""
    return fetch_weights(key, str(name)) if is_hub_name(name) else name


def _parts(key: str, name: str) -> tuple[str, str | None, str | None]:
    if not (match := NAME.fullmatch(name)):
        shapes = "hub:ORG/NAME or hub:ORG/NAME/FILE.gguf, with @REVISION or without"
        raise UserError(f"{key}={name} is not allowed: it must be {shapes}")
    return match[1], match[2], match[3]


def _files(repo: str, folder: Path) -> Mapping[str, int]:
    """Bytes of each file of a repository; offline, in a cache filled by an older client, only of the cached files."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=folder.name)}
    except CachedRepoTreeNotFoundError:
        return {file.name: file.stat().st_size for file in folder.iterdir()}


@contextmanager
def _explained(key: str, name: str, repo: str) -> Iterator[None]:
    try:
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise UserError(f"{key}={name} needs the package huggingface_hub: pip install 'llama_ft[hub]'") from error
    hub, cache = constants.ENDPOINT, f"the cache, {constants.HF_HUB_CACHE}"
    try:
        yield
    except Exception as error:  # any: which HTTP library raises it is not ours to choose
        reason = next(iter(first_cause(error).splitlines()), "")
        not_there = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
        if isinstance(error, errors.GatedRepoError):
            problem = f"is gated: accept its terms at {hub}/{repo}, then {LOG_IN}"
        elif isinstance(error, not_there):
            problem = f"does not exist, or is private: check the name at {hub}/{repo}, or {LOG_IN}"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached ({reason})"
            problem = f"is incomplete in {cache}, and {why}: connect to fetch it"
        elif getattr(error, "errno", None):
            where = getattr(error, "filename", None) or cache
            problem = f"cannot be stored in {where}: {reason}; HF_HOME=DIR names another place"
        else:
            problem = f"was not fetched: {reason}; the same command resumes the download"
        raise UserError(f"{key}={name} {problem}") from error
