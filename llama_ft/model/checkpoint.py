"""Checkpoints as they are found on disk: Hugging Face's, Meta's and our own, read piece by piece into a model.

Everything that can be wrong with one is found before its first tensor is read.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama_ft.config import UserError
from llama_ft.files import ADAPTER_FILE, WEIGHTS_FILE
from llama_ft.model.formats import (
    ROTARY_TABLES,
    check_sizes,
    hf_name,
    hf_sizes,
    is_rotated,
    meta_sizes,
    permuted_view,
)
from llama_ft.model.mapped import StoredTensor, read_pth, read_safetensors
from llama_ft.model.transformer import Transformer

INDEX_FILE = "model.safetensors.index.json"
SIZES_KEY = "llama_ft.model"  # in the metadata of our own files: the model's sizes in JSON
SECONDS_BETWEEN_LINES = 5

Shards = dict[str, list[StoredTensor]]  # by our names; a tensor's parts, in the order of the files


@dataclass(frozen=True)
class Checkpoint:
    """A folder's weights, checked against a model, not read yet."""

    folder: Path
    kind: str  # whose format it is, for people
    n_files: int
    shards: Shards
    rotary_halves: bool  # whether wq and wk are in Hugging Face's layout

    def their_name(self, name: str) -> str:
        """The name that one of our weights has in these files."""
        return hf_name(name) if self.rotary_halves else name

    @torch.no_grad()
    def load_into(self, model: Transformer, say: Callable[[str], None]) -> None:
        """Copy the weights into a model of any device and dtype. Beside the model, one piece of a tensor lives."""
        total = sum(part.n_bytes for parts in self.shards.values() for part in parts)
        files = "1 file" if self.n_files == 1 else f"{self.n_files} files"
        say(f"weights: {total / 2**20:,.0f} MB from {self.folder} ({self.kind}, {files})")
        done, last_line = 0, time.monotonic()
        for name, target in model.named_parameters():
            rotate = self.rotary_halves and is_rotated(name)
            head_rows = model.config.head_dim if rotate else 1
            # Norms that every shard repeats have one place.
            for part, place in zip(self.shards[name], _places(target, self.shards[name]), strict=False):
                for first, rows in part.pieces(head_rows):
                    ours = permuted_view(rows, len(rows) // head_rows, to_hf=False) if rotate else rows
                    place[first : first + len(rows)].view(ours.shape).copy_(ours)
                    done += rows.nbytes
                    if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                        say(f"weights: {done / total:.0%} read")
                        last_line = time.monotonic()


def open_checkpoint(folder: Path, model: Transformer) -> Checkpoint:
    """Find the weights in a folder and check that they are this model's, sizes and vocabulary included.

    Raises:
        UserError: if there are none, a file is missing or damaged, or they are those of another model.
    """
    try:
        checkpoint = _open(folder, model)
    except OSError as error:
        raise UserError(f"checkpoint={folder} cannot be read: {error.strerror}") from error
    _check_tensors(checkpoint, model)
    return checkpoint


def _open(folder: Path, model: Transformer) -> Checkpoint:
    if not folder.is_dir():
        what = "is a file: give the folder that it lies in" if folder.exists() else "there is no such folder"
        raise UserError(f"checkpoint={folder}: {what}")
    if (folder / WEIGHTS_FILE).is_file():  # before the index, as transformers has it
        return _open_single(folder, model)
    if (folder / INDEX_FILE).is_file():
        return _open_hf(folder, *_read_index(folder), model)
    if meta_files := sorted(file for file in folder.glob("consolidated.*.pth") if file.is_file()):
        return _open_meta(folder, meta_files, model)
    looked_for = f"{WEIGHTS_FILE}, {INDEX_FILE} or consolidated.00.pth"
    hint = "; pytorch_model*.bin is not read, convert it to safetensors" if any(folder.glob("*.bin")) else ""
    if (folder / ADAPTER_FILE).is_file():
        hint = f"; its {ADAPTER_FILE} is a LoRA adapter, and needs the weights that it was trained on"
    raise UserError(f"checkpoint={folder}: there are no weights in it ({looked_for}){hint}")


def _open_single(folder: Path, model: Transformer) -> Checkpoint:
    file = folder / WEIGHTS_FILE
    tensors, metadata = read_safetensors(file)
    if SIZES_KEY not in metadata:
        return _open_hf(folder, {WEIGHTS_FILE: tensors}, dict.fromkeys(tensors, WEIGHTS_FILE), model)
    try:
        check_sizes(json.loads(metadata[SIZES_KEY]), model.config, file)
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: its metadata cannot be read") from error
    return Checkpoint(folder, "llama_ft", 1, {name: [stored] for name, stored in tensors.items()}, False)


def _open_hf(
    folder: Path, files: dict[str, dict[str, StoredTensor]], weight_map: dict[str, str], model: Transformer
) -> Checkpoint:
    check_sizes(hf_sizes(folder / "config.json"), model.config, folder / "config.json")
    ours = {hf_name(name): name for name, _ in model.named_parameters()}
    shards: Shards = {}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise UserError(f"{folder / file} does not hold {name}, which {INDEX_FILE} says it does")
        # In Meta's layout under our names it would be taken for Hugging Face's: such names are unknown here.
        shards[ours.get(name, f"{file}: {name}")] = [files[file][name]]
    return Checkpoint(folder, "Hugging Face", len(files), shards, True)


def _read_index(folder: Path) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, str]]:
    """The tensors of the files that the index names, all of which must be there, and its map from tensors to files."""
    index = folder / INDEX_FILE
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read: it must hold a weight_map from tensors to files") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{index}: weight_map must name files of its own folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"checkpoint={folder}: {len(missing)} of {len(names)} files are missing: {', '.join(missing)}")
    return {name: read_safetensors(folder / name)[0] for name in names}, weight_map


def _open_meta(folder: Path, files: list[Path], model: Transformer) -> Checkpoint:
    check_sizes(meta_sizes(folder / "params.json"), model.config, folder / "params.json")
    expected = [f"consolidated.{number:02}.pth" for number in range(len(files))]
    if missing := sorted(set(expected) - {file.name for file in files}):
        raise UserError(f"checkpoint={folder}: {missing[0]} is missing; there is {', '.join(f.name for f in files)}")
    shards: Shards = {}
    for file in files:
        for name, stored in read_pth(file).items():
            shards.setdefault(name, []).append(stored)
    return Checkpoint(folder, "Meta", len(files), shards, False)


def _check_tensors(checkpoint: Checkpoint, model: Transformer) -> None:
    """Raise unless the tensors are the model's by name, and put together by shape."""
    where = f"checkpoint={checkpoint.folder} does not fit model={model.config.name}"
    expected = dict(model.named_parameters())
    found = {name for name in checkpoint.shards if not ROTARY_TABLES.fullmatch(name)}
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{where}: {len(missing)} tensors are missing, such as {checkpoint.their_name(missing[0])}")
    if unknown := sorted(found - expected.keys()):
        raise UserError(f"{where}: {len(unknown)} tensors are not the model's, such as {unknown[0]}")
    for name, target in expected.items():
        parts = checkpoint.shards[name]
        if not _places(target, parts):
            shapes, whole = " and ".join(str(part.shape) for part in parts), list(target.shape)
            hint = _missing_shards(whole, parts)
            raise UserError(f"{where}: {checkpoint.their_name(name)} is {shapes}, and should be {whole}{hint}")


def _missing_shards(whole: list[int], parts: list[StoredTensor]) -> str:
    """A hint where the parts would make up the whole if there were more of them."""
    for dim in range(len(whole)):
        part = parts[0].shape
        if len(part) == len(whole) and part[:dim] + part[dim + 1 :] == whole[:dim] + whole[dim + 1 :]:
            number, rest = divmod(whole[dim], max(1, part[dim]))
            if rest == 0 and number > len(parts):
                return f"; {len(parts)} of {number} shards are there, the others are missing"
    return ""


def _places(target: Tensor, parts: list[StoredTensor]) -> list[Tensor]:
    """The places in a tensor of the parts that make it up; none if they do not.

    Meta's shards are those of its parallel layers: wq, wk, wv, w1, w3 and the output are split by rows, wo and w2 by
    columns, the embeddings by columns (LLaMA 1 and 2) or rows (LLaMA 3), and norms are repeated. The shapes tell which.
    """
    whole = list(target.shape)
    if all(part.shape == whole for part in parts) and (len(parts) == 1 or len(whole) == 1):
        return [target]
    for dim in range(len(whole)):
        sizes = [part.shape[dim] if len(part.shape) == len(whole) else -1 for part in parts]
        filled = [[*whole[:dim], size, *whole[dim + 1 :]] for size in sizes]
        if sum(sizes) == whole[dim] and filled == [part.shape for part in parts]:
            return list(target.split(sizes, dim))
    return []
