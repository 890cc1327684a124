"""A model's sizes in Hugging Face's `config.json` and in Meta's `params.json`, read and written."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama_ft.config import ModelConfig, UserError

SIZES_KEY = "llama_ft.model"  # in the metadata of our own files: the model's sizes in JSON
HF_CONFIG, META_PARAMS = "config.json", "params.json"
META_SCALING = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context": 8192}
LLAMA_3_1_FACTOR, LLAMA_3_2_FACTOR = 8.0, 32.0
NO_CHECK = ("max_seq_len",)  # how much of a checkpoint's context is used is the user's choice

# ffn_dim_multiplier and multiple_of of the released models.
_META_WIDTHS = ((None, 256), (1.5, 256), (1.3, 4096), (1.3, 1024))


def own_sizes(text: str, file: Path) -> dict[str, Any]:
    """The sizes in the metadata of a file of ours.

    Raises:
        UserError: if it is damaged.
    """
    try:
        sizes: dict[str, Any] = {key: value for key, value in json.loads(text).items() if key != "name"}
        if "context" in sizes:  # its name before version 0.2
            sizes["max_seq_len"] = sizes.pop("context")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: its metadata cannot be read") from error
    if unknown := sizes.keys() - {field.name for field in fields(ModelConfig)}:
        raise UserError(f"{file} is damaged: its metadata cannot be read, {min(unknown)} is no size of a model")
    return sizes


def hf_sizes(file: Path) -> dict[str, Any]:
    """The sizes in Hugging Face's `config.json`, under the names of `ModelConfig`.

    Raises:
        UserError: if the file cannot be read, or describes another architecture than LLaMA's.
    """
    config = read_json(file)
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"{file}: {key}={config[key]} is not supported, it must be {value}")
    tied = _get(config, "tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{file}: tie_word_embeddings={tied} is not supported, it must be true or false")
    rope = _get(config, "rope_parameters", _get(config, "rope_scaling", {}))  # transformers 5, and before
    if not isinstance(rope, dict):
        raise UserError(f"{file}: the parameters of the rotary embeddings must be a JSON object, not {rope}")
    sizes = _named(
        file,
        dim=config.get("hidden_size"),
        n_layers=config.get("num_hidden_layers"),
        n_heads=config.get("num_attention_heads"),
        n_kv_heads=_get(config, "num_key_value_heads", config.get("num_attention_heads")),
        ffn_dim=config.get("intermediate_size"),
        vocab_size=config.get("vocab_size"),
        max_seq_len=_get(config, "max_position_embeddings", 2048),  # the default of transformers
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=_get(rope, "rope_theta", _get(config, "rope_theta", 10000.0)),
        head_size=_get(config, "head_dim", 0),
    )
    if sizes["head_size"] == 0 or sizes["head_size"] * sizes["n_heads"] == sizes["dim"]:
        sizes["head_size"] = None
    return sizes | {"tie_word_embeddings": tied} | _hf_scaling(rope, file)


def _hf_scaling(rope: dict[str, Any], file: Path) -> dict[str, Any]:
    """How rotary frequencies are scaled. (transformers' modeling_rope_utils.py has the keys.)"""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_factor": 1.0}
    if kind == "linear":
        return _named(file, rope_factor=rope.get("factor"), rope_original_context=0)
    if kind == "llama3":
        return _named(
            file,
            rope_factor=rope.get("factor"),
            rope_low_freq_factor=rope.get("low_freq_factor"),
            rope_high_freq_factor=rope.get("high_freq_factor"),
            rope_original_context=rope.get("original_max_position_embeddings"),
        )
    raise UserError(f"{file}: rotary embeddings of type {kind} are not supported, only default, linear and llama3")


def meta_sizes(file: Path, rope_factor: float) -> dict[str, Any]:
    """The sizes in Meta's `params.json`, under the names of `ModelConfig`; `vocab_size` only where the file has one.

    The width of the feed-forward layer follows from three numbers, as in the model of Meta's repository.

    Args:
        rope_factor: of a file that says that frequencies are scaled, and not by how much.

    Raises:
        UserError: if the file cannot be read, or describes another architecture than LLaMA's.
    """
    params = read_json(file)
    sizes = _named(
        file,
        dim=params.get("dim"),
        n_layers=params.get("n_layers"),
        n_heads=params.get("n_heads"),
        n_kv_heads=_get(params, "n_kv_heads", params.get("n_heads")),
        norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=_get(params, "rope_theta", 10000.0),
        rope_factor=_get(params, "rope_scaling_factor", rope_factor) if params.get("use_scaled_rope") else 1.0,
    )
    if params.get("use_scaled_rope"):
        sizes |= META_SCALING | _named(file, rope_high_freq_factor=_get(params, "rope_high_freq_factor", 4.0))
    derived = _named(
        file,
        ffn_dim_multiplier=_get(params, "ffn_dim_multiplier", 1),
        multiple_of=params.get("multiple_of", 256),
        vocab_size=_get(params, "vocab_size", -1),
    )
    try:
        sizes["ffn_dim"] = _ffn_dim(sizes["dim"], derived["ffn_dim_multiplier"], derived["multiple_of"])
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{file} is damaged: no ffn_dim follows from its sizes ({error})") from error
    if derived["vocab_size"] != -1:  # in LLaMA-2's files -1: the tokenizer's
        sizes["vocab_size"] = derived["vocab_size"]
    return sizes


def _ffn_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    width = int(2 * 4 * dim / 3)
    return math.ceil(int((1 if multiplier is None else multiplier) * width) / multiple_of) * multiple_of


def hf_config(config: ModelConfig, dtype: str, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """What `config.json` holds of a model, in the keys of transformers 4, which 5 and other readers take too."""
    rope: dict[str, Any] | None = None
    if config.rope_factor != 1 and config.rope_original_context == 0:
        rope = {"rope_type": "linear", "factor": config.rope_factor}
    elif config.rope_factor != 1:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """What `params.json` holds of a model.

    Raises:
        UserError: if Meta's format has no key for one of its sizes.
    """
    if config.head_dim * config.n_heads != config.dim:
        raise UserError(f"Meta's format knows no head_dim={config.head_dim} other than dim / n_heads")
    scaled = config.rope_factor != 1
    for key, value in META_SCALING.items() if scaled else ():
        if key != "rope_high_freq_factor" and getattr(config, key) != value:
            raise UserError(f"Meta's format knows no {key}={getattr(config, key)}, only {value}")
    multiplier, multiple_of = next(pair for pair in _widths(config) if _ffn_dim(config.dim, *pair) == config.ffn_dim)
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": scaled,
        "rope_scaling_factor": config.rope_factor if scaled else None,
        "rope_high_freq_factor": config.rope_high_freq_factor if scaled else None,
    }
    # Readers of LLaMA-2's files know no more keys than these have.
    return {key: value for key, value in params.items() if value not in (None, False)}


def _widths(config: ModelConfig) -> list[tuple[float | None, int]]:
    """Pairs of ffn_dim_multiplier and multiple_of, of which at least one gives the width."""
    multiple_of = math.gcd(config.ffn_dim, 256)
    # The middle of what is rounded up to the width, between two whole numbers, so that no rounding error matters.
    middle = config.ffn_dim - multiple_of // 2 + 0.5
    return [*_META_WIDTHS, (middle / int(2 * 4 * config.dim / 3), multiple_of)]


def check_sizes(sizes: dict[str, Any], config: ModelConfig, file: Path) -> None:
    """Compare a checkpoint's sizes with the model's.

    Raises:
        UserError: naming every size that differs.
    """
    wrong = {key: value for key, value in sizes.items() if key not in NO_CHECK and value != getattr(config, key)}
    if wrong:
        differences = ", ".join(f"model.{key} is {getattr(config, key)} and there {wrong[key]}" for key in wrong)
        raise UserError(f"{file} does not fit model={config.name}: {differences}")


def read_json(file: Path, holds: str = "the model's sizes") -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: if the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): it says {holds}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object")
    return content


def _get(content: dict[str, Any], key: str, default: Any) -> Any:
    """A value; the default where it is missing or null."""
    value = content.get(key)
    return default if value is None else value


def _named(file: Path, **sizes: Any) -> dict[str, Any]:
    if missing := [key for key, value in sizes.items() if type(value) not in (int, float)]:
        raise UserError(f"{file} does not say the model's {missing[0]} as a number")
    return sizes
