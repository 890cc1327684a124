"""Names, layout and sizes of the weights in Meta's and in Hugging Face's checkpoints.

Our names and layout are Meta's. The one difference in layout to Hugging Face's is owned here: Meta rotates adjacent
pairs of a head's features, Hugging Face rotates its two halves, so the rows of wq and wk are permuted between the two.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from llama_ft.config import ModelConfig, UserError

_HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Tables that old checkpoints hold beside the weights; ours are computed.
ROTARY_TABLES = re.compile(r"rope\.freqs|.*\.rotary_emb\.inv_freq")


def is_rotated(name: str) -> bool:
    """Whether the rows of this weight are permuted between the two layouts."""
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def permute_rotary(weight: Tensor, n_heads: int, to_hf: bool) -> Tensor:
    """Reorder the rows of wq or wk [heads * E, D] between Meta's adjacent pairs and Hugging Face's halves."""
    pairs = (-1, 2) if to_hf else (2, -1)
    heads: Tensor = weight.unflatten(0, (n_heads, -1))
    permuted: Tensor = heads.unflatten(1, pairs).transpose(1, 2).reshape(weight.shape)
    return permuted


def hf_name(name: str) -> str:
    """The name of a weight in transformers' LlamaForCausalLM.

    Raises:
        UserError: if the model has no weight of this name.
    """
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
    if match is None or match[2] not in _HF_NAMES:
        raise UserError(f"{name} is not a weight of a LLaMA decoder")
    prefix = f"model.{match[1]}" if match[1] else ""
    return f"{prefix}{_HF_NAMES[match[2]]}.weight"


def to_hf(state_dict: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same weights under the names and in the rotary layout of transformers' LlamaForCausalLM."""
    return {
        hf_name(name): permute_rotary(tensor, len(tensor) // config.head_dim, to_hf=True)
        if is_rotated(name)
        else tensor
        for name, tensor in state_dict.items()
    }


def hf_sizes(file: Path) -> dict[str, Any]:
    """The sizes in Hugging Face's `config.json`, under the names of `ModelConfig`.

    Raises:
        UserError: if the file cannot be read, or describes another architecture than LLaMA-2's.
    """
    config = _read_json(file)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, and before
    kind = rope.get("rope_type", rope.get("type", "default"))
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    expected |= {"tie_word_embeddings": False}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"{file}: {key}={config[key]} is not supported, it must be {value}")
    if kind != "default":
        raise UserError(f"{file}: rotary embeddings of type {kind} are not supported, only unscaled ones")
    return _named(
        file,
        dim=config.get("hidden_size"),
        n_layers=config.get("num_hidden_layers"),
        n_heads=config.get("num_attention_heads"),
        n_kv_heads=config.get("num_key_value_heads") or config.get("num_attention_heads"),
        ffn_dim=config.get("intermediate_size"),
        vocab_size=config.get("vocab_size"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
    )


def meta_sizes(file: Path) -> dict[str, Any]:
    """The sizes in Meta's `params.json`, under the names of `ModelConfig`; `vocab_size` only where the file has one.

    The width of the feed-forward layer follows from three numbers, as in the model of Meta's repository.

    Raises:
        UserError: if the file cannot be read, or describes another architecture than LLaMA-2's.
    """
    params = _read_json(file)
    if params.get("use_scaled_rope"):
        raise UserError(f"{file}: scaled rotary embeddings are not supported")
    sizes = _named(
        file,
        dim=params.get("dim"),
        n_layers=params.get("n_layers"),
        n_heads=params.get("n_heads"),
        n_kv_heads=params.get("n_kv_heads") or params.get("n_heads"),
        norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=params.get("rope_theta") or 10000.0,
    )
    multiplier, multiple = params.get("ffn_dim_multiplier") or 1, params.get("multiple_of", 256)
    try:
        sizes["ffn_dim"] = math.ceil(int(multiplier * int(2 * 4 * sizes["dim"] / 3)) / multiple) * multiple
        if params.get("vocab_size", -1) > 0:  # -1 in Meta's files: the tokenizer's
            sizes["vocab_size"] = params["vocab_size"]
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    return sizes


def check_sizes(sizes: dict[str, Any], config: ModelConfig, file: Path) -> None:
    """Compare a checkpoint's sizes with the model's.

    Raises:
        UserError: naming every size that differs.
    """
    wrong = {key: value for key, value in sizes.items() if value != getattr(config, key)}
    if wrong:
        differences = ", ".join(f"model.{key} is {getattr(config, key)} and there {wrong[key]}" for key in wrong)
        raise UserError(f"{file} does not fit model={config.name}: {differences}")


def _named(file: Path, **sizes: Any) -> dict[str, Any]:
    if missing := [key for key, value in sizes.items() if not isinstance(value, int | float)]:
        raise UserError(f"{file} does not say the model's {missing[0]}")
    return sizes


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): it says the model's sizes") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object")
    return content
