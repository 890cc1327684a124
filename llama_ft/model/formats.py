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
    return permuted_view(weight, n_heads, to_hf).reshape(weight.shape)


def permuted_view(weight: Tensor, n_heads: int, to_hf: bool) -> Tensor:
    """The same without a copy: [heads, 2, E / 2, D] in Hugging Face's order, [heads, E / 2, 2, D] in Meta's."""
    pairs = (-1, 2) if to_hf else (2, -1)
    heads: Tensor = weight.unflatten(0, (n_heads, *pairs))
    return heads.transpose(1, 2)


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
    rope = _get(config, "rope_parameters", _get(config, "rope_scaling", {}))  # transformers 5, and before
    if not isinstance(rope, dict):
        raise UserError(f"{file}: the parameters of the rotary embeddings must be a JSON object, not {rope}")
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
        n_kv_heads=_get(config, "num_key_value_heads", config.get("num_attention_heads")),
        ffn_dim=config.get("intermediate_size"),
        vocab_size=config.get("vocab_size"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=_get(rope, "rope_theta", _get(config, "rope_theta", 10000.0)),
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
        n_kv_heads=_get(params, "n_kv_heads", params.get("n_heads")),
        norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=_get(params, "rope_theta", 10000.0),
    )
    derived = _named(
        file,
        ffn_dim_multiplier=_get(params, "ffn_dim_multiplier", 1),
        multiple_of=params.get("multiple_of", 256),
        vocab_size=_get(params, "vocab_size", -1),
    )
    try:
        multiple, width = derived["multiple_of"], int(2 * 4 * sizes["dim"] / 3)
        sizes["ffn_dim"] = math.ceil(int(derived["ffn_dim_multiplier"] * width) / multiple) * multiple
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{file} is damaged: no ffn_dim follows from its sizes ({error})") from error
    if derived["vocab_size"] != -1:  # in Meta's files -1: the tokenizer's
        sizes["vocab_size"] = derived["vocab_size"]
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


def _get(content: dict[str, Any], key: str, default: Any) -> Any:
    """A value; the default where it is missing or null."""
    value = content.get(key)
    return default if value is None else value


def _named(file: Path, **sizes: Any) -> dict[str, Any]:
    if missing := [key for key, value in sizes.items() if type(value) not in (int, float)]:
        raise UserError(f"{file} does not say the model's {missing[0]} as a number")
    return sizes


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): it says the model's sizes") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object")
    return content
