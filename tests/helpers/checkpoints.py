"""Small checkpoints in every format, made by transformers, PEFT and by hand, and what they must compute."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from helpers.models import CPU, relative
from llama_ft.config import ModelConfig
from llama_ft.decoding.state import GenerationState
from llama_ft.files import WEIGHTS_FILE
from llama_ft.model.folder import sizes_of
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model, save_tensors

# Sizes that three shards divide, and numbers that are no one's defaults; ffn_dim 192 is no width of Meta's rule without
# a multiplier.
SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 192}
SIZES |= {"vocab_size": 120, "max_position_embeddings": 256, "rms_norm_eps": 1e-4, "rope_theta": 2e4}
LLAMA_3_1 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 6},
    "gqa": {"num_key_value_heads": 3},
    "llama3_1": {
        "num_key_value_heads": 3,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_3_1 | {"original_max_position_embeddings": 8192},
    },
    # So short an original context that all three ranges of frequencies occur within the 256 tokens.
    "scaled": {"num_key_value_heads": 3, "rope_scaling": LLAMA_3_1 | {"original_max_position_embeddings": 64}},
    "linear": {"num_key_value_heads": 6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "tied": {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "wide_heads": {"num_key_value_heads": 3, "head_dim": 32},
    "mistral": {"num_key_value_heads": 3, "model_type": "mistral", "sliding_window": None},
    "qwen2": {"num_key_value_heads": 3, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 3, "model_type": "qwen3", "head_dim": 24},
}
TO_META = ["mha", "gqa", "llama3_1", "tied"]  # Meta's format has no words for the others
# Hugging Face's names, and how Meta's parallel layers split the weight.
META_NAMES = {
    "tok_embeddings": ("model.embed_tokens", 1),  # of Llama 3 by rows
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
EVERYWHERE = ["wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "with_head": {"r": 4, "lora_alpha": 2.5, "target_modules": ["k_proj", "down_proj", "lm_head"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "up_proj": 5},
    },
    "some_layers": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj", "k_proj"], "layers_to_transform": [1]},
}
_ROOT = Path(tempfile.mkdtemp(prefix="llama_ft_tests_"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)


def theirs(name: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """transformers' model with weights far from uniform."""
    config = AutoConfig.for_model(**({"model_type": "llama"} | SIZES | MODELS[name]))
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + key.endswith("norm.weight"))
    model.tie_weights()
    return model.to(dtype)


@cache
def hf_folder(name: str, dtype: torch.dtype = torch.float32, sharded: bool = False) -> Path:
    """transformers' checkpoint, not to be changed."""
    folder = _ROOT / f"{str(dtype).removeprefix('torch.')}-{'sharded' if sharded else 'single'}" / f"{name}-hf"
    theirs(name, dtype).save_pretrained(folder, max_shard_size="200KB" if sharded else "1GB")
    return folder


@cache
def config_of(name: str) -> ModelConfig:
    """Our sizes of a model."""
    return ModelConfig(**sizes_of(hf_folder(name)))


@cache
def meta_weights(name: str) -> dict[str, Tensor]:
    """transformers' weights in Meta's layout: rows of wq and wk in the order of adjacent pairs."""
    model = theirs(name)
    state, head_dim, weights = model.state_dict(), model.config.head_dim, {}
    order = [i // 2 + i % 2 * head_dim // 2 for i in range(head_dim)]
    for meta, (hf, _) in META_NAMES.items():
        layered = "." in meta or meta.endswith("_norm")
        for layer in range(model.config.num_hidden_layers) if layered else (None,):
            prefixes = ("", "") if layer is None else (f"layers.{layer}.", f"model.layers.{layer}.")
            weight = state[f"{prefixes[1]}{hf}.weight"]
            if meta in ("attention.wq", "attention.wk"):
                weight = torch.cat([head[order] for head in weight.split(head_dim)])
            weights[f"{prefixes[0]}{meta}.weight"] = weight
    return weights


def write_meta(name: str, folder: Path, n_shards: int = 1, by_rows: bool = False, rope: bool = False) -> Path:
    """Meta's files, made by hand; with the table of rotary frequencies that old ones hold, or without."""
    folder.mkdir(exist_ok=True)
    shards: list[dict[str, Tensor]] = [{} for _ in range(n_shards)]
    for key, weight in meta_weights(name).items():
        dim = next(dim for meta, (_, dim) in META_NAMES.items() if key.removesuffix(".weight").endswith(meta))
        dim = 0 if by_rows and key.startswith("tok_embeddings") else dim
        parts = [weight] * n_shards if dim is None else weight.chunk(n_shards, dim)
        for shard, part in zip(shards, parts, strict=True):
            shard[key] = part.clone()
    for number, shard in enumerate(shards):
        torch.save(shard | ({"rope.freqs": torch.ones(8)} if rope else {}), folder / f"consolidated.{number:02}.pth")
    config = config_of(name)
    params = {
        key: getattr(config, key) for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")
    }
    # int(2 / 3 * 4 * 96) is 256: 192 is 0.7 of it, rounded up to a multiple of 64.
    params |= {"vocab_size": -1, "multiple_of": 64, "ffn_dim_multiplier": 0.7}
    (folder / "params.json").write_text(json.dumps(params | ({"use_scaled_rope": True} if "3_1" in name else {})))
    return folder


def write_own(name: str, folder: Path) -> Path:
    """What a run without LoRA leaves."""
    folder.mkdir(exist_ok=True)
    save_tensors(meta_weights(name), folder / WEIGHTS_FILE, config_of(name))
    return folder


def write_hf(name: str, folder: Path, sharded: bool = False) -> Path:
    return Path(shutil.copytree(hf_folder(name, sharded=sharded), folder, dirs_exist_ok=True))


WRITERS: dict[str, Callable[[Path], Path]] = {
    "hf": lambda folder: write_hf("gqa", folder),
    "sharded": lambda folder: write_hf("gqa", folder, sharded=True),
    "meta": lambda folder: write_meta("gqa", folder, rope=True),
    "shards": lambda folder: write_meta("gqa", folder, 3, by_rows=True),
    "own": lambda folder: write_own("gqa", folder),
}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether names, dtypes and bits are the same."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def ours(folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Transformer:
    """Our model of a folder, with the sizes that it says."""
    return load_model(ModelConfig(**(sizes_of(folder) | sizes)), str(folder), CPU, dtype).eval()


def assert_same(model: Any, reference: Any) -> None:
    """Logits of two texts to 1e-5, and 64 tokens of greedy text."""
    tokens = torch.randint(3, 120, (2, 150), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert relative(model(tokens), reference(tokens).logits) <= 1e-5
        state = GenerationState(model, [tokens[0, :9].tolist()], 64, True)
        for _ in range(64):
            state.append(state.next_logits().argmax(-1))
        settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = reference.generate(tokens[:1, :9], **settings)
    assert torch.equal(state.tokens, expected)


def peft_adapter(model: LlamaForCausalLM, folder: Path, kind: str) -> Any:
    """An adapter that changes much, in PEFT's folder; the adapted model."""
    adapted = get_peft_model(model, LoraConfig(**ADAPTERS[kind], task_type="CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return adapted
