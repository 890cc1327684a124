"""A model's weights written as a checkpoint's folder, in Hugging Face's format or in Meta's, piece by piece."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama_ft.config import ModelConfig, UserError
from llama_ft.files import WEIGHTS_FILE
from llama_ft.model.checkpoint import INDEX_FILE
from llama_ft.model.folder import LLAMA_3_VOCABULARY
from llama_ft.model.formats import hf_name, is_rotated
from llama_ft.model.sizes import HF_CONFIG, META_PARAMS, meta_params
from llama_ft.model.stored import Weight, permuted
from llama_ft.model.transformer import EMBEDDING, OUTPUT
from llama_ft.model.writing import Advance, PthFile, write_safetensors

HF_SHARD_BYTES = 5 * 10**9  # as transformers 4 splits

# The dimension by which Meta's parallel layers split a weight; norms are repeated in each shard.
_META_SPLITS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def write_hf(
    weights: Mapping[str, Weight],
    config: ModelConfig,
    content: dict[str, Any],
    folder: Path,
    n_files: int | None,
    advance: Advance,
) -> None:
    """Write what transformers loads.

    Args:
        weights: by our names, in our layout.
        content: of config.json.
        n_files: among which the tensors are shared out as evenly as they can be, at most as many as they are; None is
            one for every 5 GB.

    Raises:
        OSError: if it cannot be written.
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
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / HF_CONFIG, content)


def _shared_out(weights: Mapping[str, Weight], n_files: int) -> list[list[str]]:
    """The names in their order, in so many groups of about as many bytes; none is empty."""
    total, before = sum(weight.n_bytes for weight in weights.values()), 0
    groups: list[list[str]] = [[]]
    for place, (name, weight) in enumerate(weights.items()):
        share = int((before + weight.n_bytes / 2) * n_files / total)  # of the group that the weight's middle lies in
        must = len(groups) + len(weights) - place == n_files  # else there would be fewer weights than groups
        if groups[-1] and len(groups) < n_files and (share >= len(groups) or must):
            groups.append([])
        groups[-1].append(name)
        before += weight.n_bytes
    return groups


def write_meta(
    weights: Mapping[str, Weight], config: ModelConfig, folder: Path, n_shards: int, advance: Advance
) -> None:
    """Write what Meta's code loads, on as many GPUs as there are shards.

    Args:
        weights: by our names, in our layout.

    Raises:
        UserError: if the model cannot be split among so many, or has sizes that the format does not know.
        OSError: if it cannot be written.
    """
    params = meta_params(config)
    if config.tie_word_embeddings:
        weights = {**weights, OUTPUT: weights[EMBEDDING]}  # Meta's files hold both
    splits = {name: _split(name, config) for name in weights}
    forms = {name: (_part_shape(weight, splits[name], n_shards), weight.dtype) for name, weight in weights.items()}
    shards = [PthFile(folder / f"consolidated.{number:02}.pth", forms) for number in range(n_shards)]
    for name, weight in weights.items():
        for first, rows in weight.pieces(1):
            for number, shard in enumerate(shards):
                _write_part(shard, number, name, forms[name][0], splits[name], first, rows)
            advance(rows.nbytes)
    for shard in shards:
        shard.close()
    _write_json(folder / META_PARAMS, params)


def check_meta_shards(config: ModelConfig, n_shards: int) -> None:
    """Raise a UserError unless Meta's parallel layers can be split among so many shards."""
    for key in ("n_heads", "n_kv_heads", "ffn_dim", "dim", "vocab_size"):
        if getattr(config, key) % n_shards:
            raise UserError(f"shards={n_shards} is not allowed: it must divide model.{key}={getattr(config, key)}")


def _split(name: str, config: ModelConfig) -> int | None:
    if name == EMBEDDING:
        return 0 if config.vocab_size >= LLAMA_3_VOCABULARY else 1
    return _META_SPLITS.get(name.removesuffix(".weight").rpartition(".")[2])


def _part_shape(weight: Weight, split: int | None, n_shards: int) -> list[int]:
    return [size // n_shards if dim == split else size for dim, size in enumerate(weight.shape)]


def _write_part(
    shard: PthFile, number: int, name: str, shape: list[int], split: int | None, first: int, rows: torch.Tensor
) -> None:
    """Write what shard `number`, whose part of the weight has this shape, holds of the rows."""
    if split == 1:
        rows = rows[:, number * shape[1] : (number + 1) * shape[1]]
    elif split == 0:
        begin = number * shape[0] - first  # of the shard's rows, counted from the first of these
        rows = rows[max(begin, 0) : max(begin + shape[0], 0)]
        first = max(-begin, 0)
    if len(rows):
        shard.write(name, first, rows)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
