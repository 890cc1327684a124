"""Checkpoints on disk, in Hugging Face's, Meta's, GGUF and our own format, read piece by piece into a model.

A checkpoint is checked completely before its first tensor is read.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llama_ft.config import UserError, is_gguf
from llama_ft.files import HF_CONFIG, INDEX_FILE, META_PARAMS, WEIGHTS_FILE, explained, read_json, unusable
from llama_ft.model.formats import ROTARY_TABLES, hf_name, is_rotated
from llama_ft.model.gguf import ARCHITECTURES, architecture, gguf_names, gguf_sizes, read_gguf
from llama_ft.model.mapped import Part, StoredTensor, read_pth, read_safetensors
from llama_ft.model.sizes import LLAMA_3_1_FACTOR, check_sizes, hf_sizes, meta_sizes, own_sizes
from llama_ft.model.storage import Storage
from llama_ft.model.stored import Weight, are_equal, joined, permuted
from llama_ft.model.transformer import EMBEDDING, OUTPUT, Transformer
from llama_ft.system import Log, Pace

Shards = Mapping[str, Sequence[Part]]  # a tensor's parts by our name for it, in the order of the files


class Format(NamedTuple):
    """The differences between a checkpoint's format and ours."""

    kind: str  # the format's name, for messages
    their_name: Callable[[str], str] = str
    in_halves: bool = False  # wq and wk are in Hugging Face's rotary layout


HUGGING_FACE = Format("Hugging Face", hf_name, in_halves=True)


@dataclass(frozen=True)
class Checkpoint:
    """Weights in a folder or a GGUF file, checked against a model but not read yet."""

    folder: Path  # or file
    kind: str  # the format's name, for messages
    n_files: int
    weights: dict[str, Weight]  # in the order of the model's parameters

    def load_into(self, model: Transformer, storage: Storage, log: Log) -> None:
        """Fill a materialized model, on any device, holding no more than one piece of a tensor in addition to it."""
        total = sum(weight.n_bytes for weight in self.weights.values())
        files = "1 file" if self.n_files == 1 else f"{self.n_files} files"
        if self.folder != model.config.builtin_dir:
            log(f"weights: {total / 2**20:,.0f} MiB from {self.folder} ({self.kind}, {files})")
        done, pace = 0, Pace()
        for name, weight in self.weights.items():
            storage.load(model, name, weight)
            done += weight.n_bytes
            if pace.is_due():
                log(f"weights: {done / total:.0%} read")


def open_checkpoint(folder: Path, model: Transformer) -> Checkpoint:
    """Find the weights in a folder or GGUF file; a UserError if they are missing, damaged, or another model's."""
    with explained(f"checkpoint={folder} cannot be read"):
        form, n_files, shards = _open_gguf(folder, model) if is_gguf(folder) else _open(folder, model)
    return Checkpoint(folder, form.kind, n_files, _fitting(folder, shards, model, form))


def _open(folder: Path, model: Transformer) -> tuple[Format, int, Shards]:
    """The format, the number of files, and the tensors, which are not compared with the model yet."""
    if not folder.is_dir():
        raise unusable(folder)
    if (folder / WEIGHTS_FILE).is_file():  # before the index, as in transformers
        tensors, metadata = read_safetensors(folder / WEIGHTS_FILE)
        sizes = own_sizes(metadata, folder / WEIGHTS_FILE)
        if sizes is not None:
            check_sizes(sizes, model.config, folder / WEIGHTS_FILE)
            return Format("llama_ft"), 1, {name: [stored] for name, stored in tensors.items()}
        n_files = 1
    elif (folder / INDEX_FILE).is_file():
        tensors, n_files = _read_indexed(folder, {hf_name(name) for name, _ in model.named_parameters()})
    elif files := _meta_files(folder):
        factor = model.config.rope_factor  # Llama 3.1's and 3.2's files say only that there is one, not its value
        sizes = meta_sizes(folder / META_PARAMS, factor if factor != 1 else LLAMA_3_1_FACTOR)
        check_sizes(sizes, model.config, folder / META_PARAMS)
        return Format("Meta"), len(files), meta_tensors(folder)
    else:
        raise unusable(folder, f"there are no weights in it ({WEIGHTS_FILE}, {INDEX_FILE} or consolidated.00.pth)")
    check_sizes(hf_sizes(folder / HF_CONFIG), model.config, folder / HF_CONFIG)
    return HUGGING_FACE, n_files, _renamed(tensors, model, HUGGING_FACE)


def _open_gguf(file: Path, model: Transformer) -> tuple[Format, int, Shards]:
    check_sizes(gguf_sizes(file), model.config, file)
    numbers, tensors = read_gguf(file)
    form = Format(f"GGUF {numbers}", gguf_names(model.config), ARCHITECTURES[architecture(file)].in_halves)
    return form, 1, _renamed(tensors, model, form)


def _renamed(tensors: Mapping[str, Part], model: Transformer, form: Format) -> Shards:
    ours = {form.their_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    # A tensor of theirs that already has one of our names would pass as ours, in the wrong layout: keep it unknown.
    return {ours.get(name, f"{form.kind}'s {name}"): [stored] for name, stored in tensors.items()}


def _read_indexed(folder: Path, needed: Collection[str]) -> tuple[dict[str, StoredTensor], int]:
    """The tensors that the index names, and the number of their files.

    An index copied from another save may list tensors that no file holds any more: a tied output, rotary tables.
    """
    index = folder / INDEX_FILE
    weight_map = read_json(index, "which file holds which tensor").get("weight_map")
    if not isinstance(weight_map, dict) or any(Path(name).name != name for name in weight_map.values()):
        raise UserError(f"{index} must hold a weight_map from tensors to files in its own folder")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"checkpoint={folder}: {len(missing)} of {len(names)} files are missing: {', '.join(missing)}")
    files = {name: read_safetensors(folder / name)[0] for name in names}
    for name, file in weight_map.items():
        if name in needed and name not in files[file]:
            raise UserError(f"{folder / file} does not hold {name}, which {INDEX_FILE} says it does")
    return {name: files[file][name] for name, file in weight_map.items() if name in files[file]}, len(files)


def meta_tensors(folder: Path) -> dict[str, list[StoredTensor]]:
    """The tensors of a folder in Meta's format; a UserError if a file is missing or damaged."""
    files = _meta_files(folder)
    expected = [f"consolidated.{number:02}.pth" for number in range(max(1, len(files)))]
    if missing := sorted(set(expected) - {file.name for file in files}):
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"checkpoint={folder}: {missing[0]} is missing; found: {found}")
    shards: dict[str, list[StoredTensor]] = {}
    for file in files:
        for name, stored in read_pth(file).items():
            shards.setdefault(name, []).append(stored)
    return shards


def _meta_files(folder: Path) -> list[Path]:
    files = (file for file in folder.glob("consolidated.*.pth") if file.is_file())
    return sorted(files, key=lambda file: (len(file.name), file.name))  # 100 after 99


def _fitting(folder: Path, stored: Shards, model: Transformer, form: Format) -> dict[str, Weight]:
    """The model's weights; a UserError unless the tensors have its names and, with shards joined, its shapes."""
    where = f"checkpoint={folder} does not fit model={model.config.name}"
    expected, their_name = dict(model.named_parameters()), form.their_name
    shards = {name: parts for name, parts in stored.items() if not ROTARY_TABLES.fullmatch(name)}
    if missing := [name for name in expected if name not in shards]:
        raise UserError(f"{where}: {len(missing)} tensors are missing, such as {their_name(missing[0])}")
    # Some checkpoints hold a second copy of a tied output.
    allowed = expected | ({OUTPUT: expected[EMBEDDING]} if model.config.tie_word_embeddings else {})
    if unknown := sorted(shards.keys() - allowed.keys()):
        raise UserError(f"{where}: {len(unknown)} tensors are not the model's, such as {unknown[0]}")
    weights = {}
    for name in filter(shards.__contains__, allowed):
        weight = joined(shape := list(allowed[name].shape), shards[name])
        if weight is None:
            shapes, hint = " and ".join(str(part.shape) for part in shards[name]), _missing_shards(shape, shards[name])
            raise UserError(f"{where}: {their_name(name)} is {shapes}, but should be {shape}{hint}")
        rotated = form.in_halves and is_rotated(name)
        weights[name] = permuted(weight, model.config.head_dim, to_hf=False) if rotated else weight
    if OUTPUT in weights and OUTPUT not in expected and not are_equal(weights[OUTPUT], weights[EMBEDDING]):
        names = f"{their_name(OUTPUT)} and {their_name(EMBEDDING)}"
        raise UserError(f"{where}: {names} differ, but model.tie_word_embeddings=true says they are the same tensor")
    return {name: weights[name] for name in expected}


def _missing_shards(shape: list[int], parts: Sequence[Part]) -> str:
    """A hint if the parts are empty, or if more of them would make up the weight."""
    if not (part := math.prod(parts[0].shape)):
        return "; it is empty, as when DeepSpeed ZeRO-3 saves a model without gathering its weights"
    number, rest = divmod(math.prod(shape), part)
    is_part = rest == 0 and number > len(parts)
    return f"; {len(parts)} of {number} shards were found, the others are missing" if is_part else ""
