"""Writes a model's weights as a checkpoint folder, in Hugging Face's or Meta's format, piece by piece."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

from llama_ft.config import ModelConfig
from llama_ft.files import HF_CONFIG, INDEX_FILE, META_PARAMS, WEIGHTS_FILE, Json, write_json
from llama_ft.model.folder import LLAMA_3_VOCABULARY
from llama_ft.model.formats import hf_name, is_rotated
from llama_ft.model.sizes import meta_params
from llama_ft.model.stored import Weight, permuted
from llama_ft.model.transformer import EMBEDDING, OUTPUT
from llama_ft.model.writing import PthFile, as_bytes, write_safetensors
from llama_ft.system import Advance

Weights = Mapping[str, Weight]  # by our names, in our layout
HF_SHARD_BYTES = 5 * 10**9  # as in transformers 4

# The dimension by which Meta's parallel layers split a weight; norms are repeated in each shard.
_META_SPLITS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def write_hf(
    weights: Weights, config: ModelConfig, content: Json, folder: Path, n_files: int | None, advance: Advance
) -> None:
    """Write a folder that transformers loads, with `content` as config.json; an OSError if it cannot be written.

    `n_files` is at most the number of tensors; None is one for every 5 GB.
    """
    theirs = {
        hf_name(name): permuted(weight, config.head_dim, to_hf=True) if is_rotated(name) else weight
        for name, weight in weights.items()
    }
    total = sum(weight.n_bytes for weight in theirs.values())
    groups = _shared_out(theirs, n_files or -(-total // HF_SHARD_BYTES))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = WEIGHTS_FILE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_safetensors(folder / file, {name: theirs[name] for name in names}, advance)
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / HF_CONFIG, content)


def _shared_out(weights: Weights, n_files: int) -> list[list[str]]:
    """The names in their order, in `n_files` groups of about equal size; none is empty."""
    total, before = sum(weight.n_bytes for weight in weights.values()), 0
    groups: list[list[str]] = [[]]
    for index, (name, weight) in enumerate(weights.items()):
        share = int((before + weight.n_bytes / 2) * n_files / total)  # the group of the weight's middle
        must = len(groups) + len(weights) - index == n_files  # else too few weights would be left for the groups
        if groups[-1] and len(groups) < n_files and (share >= len(groups) or must):
            groups.append([])
        groups[-1].append(name)
        before += weight.n_bytes
    return groups


def write_meta(weights: Weights, config: ModelConfig, folder: Path, n_shards: int, advance: Advance) -> None:
    """Write a folder that Meta's code loads, on one GPU per shard; an OSError if it cannot be written.

    A UserError names a size of the model that the format cannot express.
    """
    params = meta_params(config)
    if config.tie_word_embeddings:
        weights = {**weights, OUTPUT: weights[EMBEDDING]}  # Meta's files hold both
    dims = {name: _split_dim(name, config) for name in weights}
    forms = {name: _form(weight, dims[name], n_shards) for name, weight in weights.items()}
    with ExitStack() as files:
        paths = [folder / f"consolidated.{number:02}.pth" for number in range(n_shards)]
        shards = [files.enter_context(closing(PthFile(path, forms))) for path in paths]
        for name, weight in weights.items():
            with ExitStack() as streams:
                parts = [streams.enter_context(shard.tensor(name)) for shard in shards]
                for first, rows in weight.pieces(1):
                    for number, part in enumerate(parts):
                        part.write(as_bytes(_part(rows, first, dims[name], forms[name].shape, number)))
                    advance(rows.nbytes)
    write_json(folder / META_PARAMS, params)


def _split_dim(name: str, config: ModelConfig) -> int | None:
    """The dimension by which a weight is split among the shards; None repeats it in each."""
    if name == EMBEDDING:
        return 0 if config.vocab_size >= LLAMA_3_VOCABULARY else 1
    return _META_SPLITS.get(name.removesuffix(".weight").rpartition(".")[2])


def _form(weight: Weight, split_dim: int | None, n_shards: int) -> Tensor:
    shape = [size // n_shards if dim == split_dim else size for dim, size in enumerate(weight.shape)]
    return torch.empty(shape, dtype=weight.dtype, device="meta")


def _part(rows: Tensor, first: int, dim: int | None, shape: Sequence[int], shard: int) -> Tensor:
    """The part of these rows, which begin at `first`, in a shard whose part of the weight has this shape."""
    if dim is None:
        return rows
    begin = shard * shape[dim]
    if dim == 1:
        return rows[:, begin : begin + shape[1]]
    return rows[max(begin - first, 0) : max(begin + shape[0] - first, 0)]
