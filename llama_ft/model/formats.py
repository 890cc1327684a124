"""Names and layout of the weights in Meta's and in Hugging Face's checkpoints.

Our names and layout are Meta's. Hugging Face's layout differs in one point, handled here: Meta rotates adjacent pairs
of a head's features, Hugging Face rotates its two halves. So the rows of wq and wk are permuted between the two, as are
their biases and the weights of Qwen 3's query and key norms.
"""

import re

from torch import Tensor

from llama_ft.config import UserError

_HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Tables that checkpoints hold in addition to the weights; ours are computed.
ROTARY_TABLES = re.compile(r"rope\.freqs|.*rope_freqs\.weight|.*\.rotary_emb\.inv_freq")


def is_rotated(name: str) -> bool:
    """Return True if the rows of this weight or bias are permuted between the two layouts."""
    return re.search(r"attention\.(wq|wk|q_norm|k_norm)\.(weight|bias)$", name) is not None


def permute_rotary(weight: Tensor, n_heads: int, to_hf: bool) -> Tensor:
    """Reorder rows of wq or wk, [heads * E, ...], between Meta's adjacent pairs and Hugging Face's halves."""
    pairs = (-1, 2) if to_hf else (2, -1)
    heads: Tensor = weight.unflatten(0, (n_heads, *pairs))
    return heads.transpose(1, 2).reshape(weight.shape)


def hf_name(name: str) -> str:
    """The name of a weight in transformers' LlamaForCausalLM; a UserError if a decoder has no weight of this name."""
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)(\.weight|\.bias)", name)
    if match is None or match[2] not in _HF_NAMES:
        raise UserError(f"{name} is not a weight of a LLaMA decoder")
    prefix = f"model.{match[1]}" if match[1] else ""
    return f"{prefix}{_HF_NAMES[match[2]]}{match[3]}"


def our_name(name: str) -> str | None:
    """Our name for one of transformers' weights, None if it is not a LLaMA decoder's."""
    match = re.fullmatch(r"(?:model\.)?(layers\.\d+\.)?(.+)\.weight", name)
    ours = {theirs.removeprefix("model."): mine for mine, theirs in _HF_NAMES.items()}
    return f"{match[1] or ''}{ours[match[2]]}.weight" if match and match[2] in ours else None
