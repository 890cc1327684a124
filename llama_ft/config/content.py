"""Hashes of the files that a config names: by content, not by path."""

import hashlib
import re
from pathlib import Path

from llama_ft.config.source import path_of

WHOLE_BYTES = 64 * 2**20  # files up to this size are read whole
CHECKPOINT_FILES = re.compile(
    r".*\.(safetensors|pth)|((adapter|generation|tokenizer)_)?config\.json|params\.json|model\.safetensors\.index\.json"
    r"|adapter_model\.bin|chat_template\.jinja"
)
N_PIECES, PIECE_BYTES = 64, 2**16  # read from larger files: evenly spaced, both ends included


def content_hash(name: str, *, data: bool = False) -> str:
    """Hash a file, or a folder's checkpoint (with `data` all its files); return the name itself if neither exists."""
    digest = hashlib.sha256()
    try:
        path = path_of(name)
        if path.is_file():
            _add(digest, path)
        elif path.is_dir():
            files = filter(Path.is_file, path.rglob("*") if data else path.iterdir())
            for file in sorted(file for file in files if data or CHECKPOINT_FILES.fullmatch(file.name)):
                digest.update(file.name.encode())
                _add(digest, file)
        else:
            return name
    except (OSError, RuntimeError):  # the code that reads the file raises a better message
        return name
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{size}:".encode())
    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            digest.update(stream.read())
            return
        for piece in range(N_PIECES):
            stream.seek((size - PIECE_BYTES) * piece // (N_PIECES - 1))
            digest.update(stream.read(PIECE_BYTES))
