"""Model sizes read from a checkpoint folder or GGUF file, for `model=from_checkpoint`."""

import re
from pathlib import Path

from llama_ft.config import FROM_CHECKPOINT, PACKAGE_DIR, UserError, is_gguf
from llama_ft.files import HF_CONFIG, META_PARAMS, WEIGHTS_FILE, explained, unusable
from llama_ft.model.checkpoint import meta_tensors
from llama_ft.model.gguf import gguf_sizes
from llama_ft.model.mapped import read_safetensors
from llama_ft.model.sizes import LLAMA_3_1_FACTOR, LLAMA_3_2_FACTOR, Sizes, hf_sizes, meta_sizes, own_sizes
from llama_ft.model.stored import are_equal, joined
from llama_ft.model.transformer import EMBEDDING, OUTPUT

LLAMA_3_VOCABULARY = 128_000  # or more; LLaMA-2's has 32,000


def sizes_of(folder: Path) -> Sizes:
    """The sizes of a checkpoint's model by the names of `ModelConfig`; a UserError if it has none that we know.

    A folder in Hugging Face's format needs only config.json.
    """
    if is_gguf(folder):
        return {"name": _name(folder), **gguf_sizes(folder)}
    if not folder.is_dir():
        raise unusable(folder)
    with explained(f"checkpoint={folder} cannot be read"):
        return {"name": _name(folder), **_sizes(folder)}


def hub_repository(folder: Path) -> str | None:
    """ORG/NAME of a folder in huggingface_hub's cache, models--ORG--NAME/snapshots/REVISION."""
    match = re.fullmatch(r"models--(.+)/snapshots/[^/]+", "/".join(folder.parts[-3:]))
    return match[1].replace("--", "/") if match else None


def _name(folder: Path) -> str:
    """The checkpoint's name, for tables and file names; never that of a built-in model."""
    path = folder.resolve()
    name = folder.stem if is_gguf(folder) else (hub_repository(path) or path.name).rpartition("/")[2]
    name = re.sub(r"[^\w.+-]", "_", name) or FROM_CHECKPOINT
    return f"{name}-checkpoint" if (PACKAGE_DIR / "model" / name).is_dir() else name


def _sizes(folder: Path) -> Sizes:
    if (file := folder / WEIGHTS_FILE).is_file() and (sizes := own_sizes(read_safetensors(file)[1], file)) is not None:
        return sizes
    if (folder / HF_CONFIG).is_file():
        return hf_sizes(folder / HF_CONFIG)
    if (folder / META_PARAMS).is_file():
        return _meta_sizes(folder)
    raise unusable(folder, f"there is no {HF_CONFIG} or {META_PARAMS} in it to say the model's sizes")


def _meta_sizes(folder: Path) -> dict[str, float]:
    sizes = meta_sizes(folder / META_PARAMS, LLAMA_3_1_FACTOR)
    tensors = meta_tensors(folder)
    if EMBEDDING not in tensors:
        raise UserError(f"checkpoint={folder}: it has no {EMBEDDING}")
    parts = tensors[EMBEDDING]
    by_rows = parts[0].shape[1:] == [sizes["dim"]]
    n_rows = sum(part.shape[0] for part in parts) if by_rows else parts[0].shape[0]
    shape = [int(sizes.setdefault("vocab_size", n_rows)), int(sizes["dim"])]
    embedding, output = joined(shape, parts), joined(shape, tensors.get(OUTPUT, []))
    # Llama 3.2's small models tie the two but hold two copies.
    tied = OUTPUT not in tensors or (embedding is not None and output is not None and are_equal(embedding, output))
    if tied:
        sizes |= meta_sizes(folder / META_PARAMS, LLAMA_3_2_FACTOR)
    context = released_context(sizes["vocab_size"], sizes["rope_theta"], sizes["rope_factor"])
    return sizes | {"tie_word_embeddings": tied, "max_seq_len": context}


def released_context(vocab_size: float, rope_theta: float, rope_factor: float) -> int:
    """The assumed context, in tokens, of a model in Meta's format: that of the released models like it.

    Meta's files do not state it. (transformers' convert_llama_weights_to_hf.py has the same numbers.)
    """
    if rope_factor != 1:
        return 131072  # Llama 3.1
    if vocab_size >= LLAMA_3_VOCABULARY:
        return 8192  # Llama 3
    return 16384 if rope_theta > 10_000 else 4096  # Code Llama, LLaMA 2
