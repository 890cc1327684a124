"""Reads and writes a model's sizes in Hugging Face's `config.json` and Meta's `params.json`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from llama_ft.config import FEATURES, ModelConfig, UserError
from llama_ft.config.checks import readable
from llama_ft.files import Json, read_json

Sizes = Mapping[str, str | float | None]  # fields of ModelConfig by name

SIZES_KEY = "llama_ft.model"  # the model's sizes in JSON, in our own files' metadata
HOLDS_SIZES = "the model's sizes"
META_SCALING = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context": 8192}
LLAMA_3_1_FACTOR, LLAMA_3_2_FACTOR = 8.0, 32.0
NO_CHECK = ("max_seq_len",)  # users may choose another context

_HF_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}


@dataclass(frozen=True)
class _HfType:
    """A `model_type` of transformers, where it differs from LLaMA; the defaults are in its configuration_TYPE.py."""

    fixed: Json  # keys of which only this value is supported
    defaults: Json = field(default_factory=dict)  # of keys missing in `config.json`
    features: tuple[str, ...] = ()


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_HF_TYPES = {
    "llama": _HfType({"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}),
    "mistral": _HfType(
        {"hidden_act": "silu", "sliding_window": None},
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": _HfType({"hidden_act": "silu", "use_sliding_window": False}, _QWEN, ("qkv_bias",)),
    "qwen3": _HfType(
        {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        _QWEN | {"head_dim": 128},
        ("qk_norm",),
    ),
}
# Keys of each `rope_type`'s scaling of rotary frequencies, from transformers' modeling_rope_utils.py.
_HF_SCALING: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_context": "original_max_position_embeddings",
    },
}
_META_KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")
# ffn_dim_multiplier and multiple_of of the released models.
_META_WIDTHS = ((1.0, 256), (1.5, 256), (1.3, 4096), (1.3, 1024))


def own_sizes(metadata: Mapping[str, str], file: Path) -> Sizes | None:
    """The sizes in our safetensors files' metadata; None in a file that is not ours, a UserError if damaged."""
    if SIZES_KEY not in metadata:
        return None
    with readable(file):
        sizes = {key: value for key, value in json.loads(metadata[SIZES_KEY]).items() if key != "name"}
        if "context" in sizes:  # its name before version 0.2
            sizes["max_seq_len"] = sizes.pop("context")
        if unknown := sizes.keys() - {field.name for field in fields(ModelConfig)}:
            raise UserError(f"{file} cannot be read: {min(unknown)} is not a model size")
    return dict.fromkeys(FEATURES, False) | sizes


def hf_sizes(file: Path) -> Sizes:
    """The sizes in Hugging Face's `config.json`; a UserError if its architecture is not supported."""
    config = read_json(file, HOLDS_SIZES)
    if (kind := config.get("model_type", "llama")) not in _HF_TYPES:
        *most, last = _HF_TYPES
        raise UserError(f"{file}: model_type={kind} is not supported, it must be {', '.join(most)} or {last}")
    config = _HF_TYPES[kind].defaults | config
    for key, value in _HF_TYPES[kind].fixed.items():
        if config.get(key, value) != value:
            allowed = "null" if value is None else value
            raise UserError(f"{file}: {key}={config[key]} is not supported in {kind}, it must be {allowed}")
    tied = config.get("tie_word_embeddings") is True
    defaults = {"n_kv_heads": config.get("num_attention_heads"), "max_seq_len": 2048, "norm_eps": 1e-6}
    sizes = numbers_of(config, _HF_KEYS, defaults, file) | {"tie_word_embeddings": tied} | _hf_rope(config, file)
    head_size = numbers_of(config, {"head_size": "head_dim"}, {"head_size": 0}, file)["head_size"]
    is_usual = head_size * sizes["n_heads"] in (0, sizes["dim"])
    features = {key: key in _HF_TYPES[kind].features for key in FEATURES}
    return {**sizes, "head_size": None if is_usual else head_size, **features}


def _hf_rope(config: Json, file: Path) -> dict[str, float]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, and earlier
    if not isinstance(rope, dict):
        raise UserError(f"{file}: the parameters of the rotary embeddings must be a JSON object, not {rope}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _HF_SCALING:
        raise UserError(f"{file}: rotary embeddings of type {kind} are not supported, only default, linear and llama3")
    if (share := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1):
        raise UserError(f"{file}: partial_rotary_factor={share} is not supported, it must be 1")
    fixed: dict[str, dict[str, float]] = {"default": {"rope_factor": 1.0}, "linear": {"rope_original_context": 0}}
    theta = {"rope_theta": config.get("rope_theta") or 10000.0}
    return fixed.get(kind, {}) | numbers_of(rope, {"rope_theta": "rope_theta"} | _HF_SCALING[kind], theta, file)


def meta_sizes(file: Path, rope_factor: float) -> dict[str, float]:
    """The sizes in Meta's `params.json`; `vocab_size` only if the file has one.

    The width of the feed-forward layer follows from three numbers, as in Meta's code. `rope_factor` is used if the file
    says that frequencies are scaled but not by how much.
    """
    params = read_json(file, HOLDS_SIZES)
    defaults = {"n_kv_heads": params.get("n_heads"), "norm_eps": 1e-5, "rope_theta": 10000.0}
    sizes = numbers_of(params, {key: key for key in _META_KEYS}, defaults, file) | {"rope_factor": 1.0}
    if params.get("use_scaled_rope"):
        keys = {"rope_factor": "rope_scaling_factor", "rope_high_freq_factor": "rope_high_freq_factor"}
        sizes |= META_SCALING | numbers_of(params, keys, META_SCALING | {"rope_factor": rope_factor}, file)
    keys = {key: key for key in ("ffn_dim_multiplier", "multiple_of", "vocab_size")}
    width = numbers_of(params, keys, {"ffn_dim_multiplier": 1.0, "multiple_of": 256, "vocab_size": -1}, file)
    sizes["ffn_dim"] = _ffn_dim(sizes["dim"], width["ffn_dim_multiplier"], width["multiple_of"])
    if width["vocab_size"] != -1:  # -1 in LLaMA-2's files means the tokenizer's
        sizes["vocab_size"] = width["vocab_size"]
    return sizes


def _ffn_dim(dim: float, multiplier: float, multiple_of: float) -> int:
    return int(math.ceil(int(multiplier * int(8 * dim / 3)) / multiple_of) * multiple_of)


def hf_config(config: ModelConfig, dtype: str, bos_id: int | None, eos_id: int | None) -> Json:
    """A model's `config.json`, in transformers 4's keys; a UserError if transformers has no architecture like it."""
    features = tuple(key for key in FEATURES if getattr(config, key))
    kind = next((kind for kind, each in _HF_TYPES.items() if each.features == features), None)
    if kind is None:
        raise UserError(f"no model_type of Hugging Face has {' and '.join(features)}")
    rope: Json | None = None
    if config.rope_factor != 1:
        scaling = "linear" if config.rope_original_context == 0 else "llama3"
        rope = {"rope_type": scaling} | {key: getattr(config, ours) for ours, key in _HF_SCALING[scaling].items()}
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **_HF_TYPES[kind].fixed,
        **{key: getattr(config, ours) for ours, key in _HF_KEYS.items()},
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def meta_params(config: ModelConfig) -> Json:
    """A model's `params.json`; a UserError if Meta's format has no key for one of its sizes."""
    for key in FEATURES:
        if getattr(config, key):
            raise UserError(f"Meta's format does not support {key}: write this model with to=hf")
    if config.head_dim * config.n_heads != config.dim:
        raise UserError(f"Meta's format does not support head_dim={config.head_dim}, only dim / n_heads")
    scaled = config.rope_factor != 1
    for key, value in META_SCALING.items() if scaled else ():
        if key != "rope_high_freq_factor" and getattr(config, key) != value:
            raise UserError(f"Meta's format does not support {key}={getattr(config, key)}, only {value}")
    # The last pair gives any width; the added half protects the truncation to a whole number from rounding errors.
    widths = [*_META_WIDTHS, ((config.ffn_dim + 0.5) / int(8 * config.dim / 3), 1)]
    multiplier, multiple_of = next(pair for pair in widths if _ffn_dim(config.dim, *pair) == config.ffn_dim)
    params: Json = {key: getattr(config, key) for key in (*_META_KEYS, "vocab_size")} | {"multiple_of": multiple_of}
    # Readers of LLaMA-2's files know only the keys above.
    if multiplier != 1:
        params["ffn_dim_multiplier"] = multiplier
    if scaled:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": config.rope_factor}
        params["rope_high_freq_factor"] = config.rope_high_freq_factor
    return params


def check_sizes(sizes: Sizes, config: ModelConfig, file: Path) -> None:
    """Raise a UserError that names the sizes in which a checkpoint differs, apart from some that users may set."""
    wrong = {key: value for key, value in sizes.items() if not _agree(value, getattr(config, key))}
    for key in (*NO_CHECK, *(key for key in config.given if key.startswith(("rope_", "norm_")))):
        wrong.pop(key, None)
    if wrong:
        differences = ", ".join(f"model.{key} is {getattr(config, key)} but the file has {wrong[key]}" for key in wrong)
        raise UserError(f"{file} does not fit model={config.name}: {differences}")


def _agree(theirs: str | float | None, ours: str | float | None) -> bool:
    """Return True if two sizes are equal, floats up to fp32 rounding: 1e-5 may be stored as 9.99999975e-06."""
    if isinstance(theirs, float) and isinstance(ours, float):
        return math.isclose(theirs, ours, rel_tol=1e-6)
    return theirs == ours


def numbers_of(content: Json, keys: Mapping[str, str], defaults: Mapping[str, object], file: Path) -> dict[str, float]:
    """Numbers by our names, read from their `keys`; the default where one is missing or null."""
    numbers = {}
    for ours, key in keys.items():
        value = content.get(key)
        number = defaults.get(ours) if value is None else value
        if type(number) is not int and type(number) is not float:
            raise UserError(f"{file} does not give the model's {ours} as a number")
        numbers[ours] = number
    return numbers
