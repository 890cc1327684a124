"""Files that are written whole or not at all, and folders that only one process at a time writes into."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from llama_ft.config import UserError, path_of
from llama_ft.system import Log, silent

WEIGHTS_FILE = "model.safetensors"  # Hugging Face's name for a checkpoint in one file, and ours
INDEX_FILE = "model.safetensors.index.json"  # maps tensors to files if there are several
CHAT_TEMPLATE = "chat_template.jinja"  # transformers' name since version 5
HF_CONFIG, META_PARAMS = "config.json", "params.json"  # contain a checkpoint's sizes
ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names, and ours
TRAINED_FILES = (ADAPTER_FILE, ADAPTER_CONFIG_FILE, WEIGHTS_FILE)  # those that a run leaves, with LoRA and without
LFS_POINTER, LFS_HINT = b"version https://git-lfs", "is a Git LFS pointer to the file: git lfs pull fetches it"

Json = dict[str, Any]  # an object with keys that others define: a user's record, Hugging Face's config.json


def regular(file: Path) -> Path:
    """Return the file, which is about to be read; an OSError if it is a pipe or a device, which may never end."""
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a folder fails by itself
        raise OSError(errno.EINVAL, "it is a pipe or a device: save its content as a file", str(file))
    return file


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """Turn a failed file operation in this block into a UserError with the problem and the system's reason."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # the latter two from a damaged .gz
        raise UserError(f"{problem}: {getattr(error, 'strerror', None) or error}") from error


def text_of(file: Path, name: str) -> str:
    """Read a UTF-8 file, line ends unchanged, without a byte-order mark; a UserError calls it `name`."""
    with explained(f"{name} cannot be read"):
        content = regular(file).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} cannot be read: line {line} is not UTF-8 text; save it as UTF-8") from error


def read_json(file: Path, holds: str) -> Json:
    """Read a JSON object; if that fails, a UserError says what the file `holds`."""
    try:
        content = json.loads(regular(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); it holds {holds}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object")
    return content


def write_json(file: Path, content: Json) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def why_no_folder(path: Path) -> str:
    """For messages: the reason why a path is not a folder."""
    if path.exists():
        return "it is a file: give the folder that contains it"
    name = re.fullmatch(r"(?:hf:|https?:/+huggingface\.co/)?([\w.-]+/[\w.-]+)", str(path))
    hint = f"; a name on the Hugging Face hub is hub:{name[1]}" if name and not path.parent.exists() else ""
    return f"there is no such {'file' if path.suffix == '.gguf' else 'folder'}{hint}"


def unread_hint(place: Path | str, names: Collection[str]) -> str:
    """For messages: which files a place has instead of supported weights, and what to do about it."""
    if {ADAPTER_FILE, ADAPTER_CONFIG_FILE} & {*names}:
        return f"; it is a LoRA adapter: give adapter={place}, and as checkpoint the model it was trained on"
    found = sorted(name for name in names if name.endswith((".gguf", ".bin")))
    if gguf := [name for name in found if name.endswith(".gguf")]:
        return f"; give a GGUF file by its name: checkpoint={place}/{gguf[0]}"
    return f"; {found[0]} is not read: convert it to safetensors" if found else ""


def unusable(folder: Path, missing: str = "") -> UserError:
    """The error for a checkpoint that is no folder, or in which something is `missing`."""
    reason = missing + unread_hint(folder, os.listdir(folder)) if folder.is_dir() else why_no_folder(folder)
    return UserError(f"checkpoint={folder}: {reason}")


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to: renamed when the block ends, removed if it fails."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into: renamed when the block ends, removed if it fails.

    An OSError if the folder exists and is not empty, or cannot be created.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            to_disk(file)
        to_disk(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def new_folder(name: str) -> Path:
    """Create a folder of this name or, if that is taken, `name_2`, `name_3` …"""
    for number in count(1):
        folder = Path(name if number == 1 else f"{name}_{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk: a rename must not outlive its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, wait_seconds: float = 0, log: Log = silent) -> Iterator[int]:
    """Lock a folder for this process and for those that inherit the yielded descriptor.

    The lock is on the folder itself: it leaves no file behind, and ends with its last holder, however that ends. A
    UserError if another process holds it for longer than `wait_seconds`; a wait without limit is logged.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + wait_seconds
        if end == math.inf and not try_lock(descriptor):
            log(f"another run is writing into {folder}: waiting for its end")
        while not try_lock(descriptor):
            if time.monotonic() >= end:
                raise UserError(f"another run is writing into {folder}: wait for its end, or name another folder")
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(file: int | IO[bytes]) -> bool:
    """Lock an open file or folder; return False if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, such as some network drives: nothing to hold, nothing to wait for
        pass
    return True


def check_replaceable(folder: Path, names: Sequence[str], mark: str = '"schema_version"') -> None:
    """Raise a UserError if the folder has files of these names that llama_ft did not write.

    It wrote them if the first one, which is always written with the others, contains the mark.
    """
    there = [name for name in names if os.path.lexists(folder / name) and not (folder / name).is_dir()]
    first = folder / names[0] if names else folder
    is_ours = first.is_file() and mark in first.read_text(encoding="utf-8", errors="replace")
    if there and not is_ours:
        reason = f"which llama_ft did not write, and would overwrite ({', '.join(names)})"
        raise UserError(f"{folder} holds {there[0]}, {reason}: name another folder, or move it")


@contextmanager
def output_folder(output: str | None, kind: str, name: str, files: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the locked folder for a command's results: `output`, or else a new `outputs/KIND/TIME_NAME`.

    Folders created for it are removed again if nothing was written. `files` will be written there, the JSON first. A
    UserError if they cannot be, if another process writes into the folder, or if llama_ft did not write files of these
    names that are there already.
    """
    folder = path_of(output or f"outputs/{kind}/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{name}")
    made = [each for each in (folder, *folder.parents) if not each.exists()]  # the innermost first
    with explained(f"output={folder}: the folder cannot be created"):
        if not output:
            folder = new_folder(str(folder))
            made[:1] = [folder]
        else:
            folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            with explained(f"output={folder} cannot be written to"):  # before anything long begins
                TemporaryFile(dir=folder).close()
            check_replaceable(folder, files)
            yield folder
    finally:
        with suppress(OSError):
            for each in made:
                each.rmdir()  # fails if it is not empty
