# mypy: ignore-errors
"""The peers' own models and adapters in the plain loop: transformers with PEFT, LitGPT, torchtune.

Runs in their environments. The first loss shows if a model has the work's weights.
"""

import logging
import warnings

import torch
import torch.nn.functional as F

from benchmarks.peers import workload
from benchmarks.peers.workload import IGNORED, LORA_ALPHA, LORA_DROPOUT, LORA_RANK, LORA_TARGETS, SIZES


def transformers_loop(row):
    """transformers' LlamaForCausalLM, with PEFT for LoRA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = SIZES
    config = LlamaConfig(
        hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_heads,
        vocab_size=c.vocab_size, intermediate_size=c.ffn_dim, max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(workload.weights())
    if row.has("lora"):
        from peft import LoraConfig, get_peft_model

        targets = list(LORA_TARGETS)
        lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=targets)
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                layer, _, target = name.split(".layers.")[1].split(".")[:3]
                parameter.data.copy_(workload.lora_a(int(layer), target))
    return model, lambda tokens, labels: model(input_ids=tokens, labels=labels, use_cache=False).loss


def litgpt(row):
    """LitGPT's GPT, or its LoRA variant: queries, keys and values are one matrix."""
    from litgpt import config, lora, model
    from litgpt.utils import chunked_cross_entropy

    c, theirs = SIZES, workload.weights()
    settings = {
        "block_size": c.max_seq_len, "vocab_size": c.vocab_size, "padded_vocab_size": c.vocab_size, "bias": False,
        "n_layer": c.n_layers, "n_head": c.n_heads, "n_embd": c.dim, "intermediate_size": c.ffn_dim,
        "rotary_percentage": 1.0, "rope_base": int(c.rope_theta), "parallel_residual": False,
        "norm_class_name": "RMSNorm", "norm_eps": c.norm_eps, "mlp_class_name": "LLaMAMLP",
    }  # fmt: skip
    if row.has("lora"):
        adapters = {"lora_r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": LORA_DROPOUT}
        gpt = lora.GPT(lora.Config(**settings, **adapters, lora_query=True, lora_value=True))
        lora.mark_only_lora_as_trainable(gpt)
    else:
        gpt = model.GPT(config.Config(**settings))
    names = {
        "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "model.norm": "transformer.ln_f",
        "self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2",
        "mlp.down_proj": "mlp.proj", "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2",
    }  # fmt: skip
    own = {renamed(name, names): weight for name, weight in theirs.items()}
    for layer, block in enumerate(gpt.transformer.h):
        parts = [theirs[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
        own[f"transformer.h.{layer}.attn.qkv.weight"] = torch.cat(parts)
        if row.has("lora"):
            block.attn.qkv.lora_A.data.copy_(torch.cat([workload.lora_a(layer, target) for target in LORA_TARGETS]))
    gpt.load_state_dict(own, strict=False)
    return gpt, lambda tokens, labels: chunked_cross_entropy(gpt(tokens)[:, :-1], labels[:, 1:], chunk_size=0)


def renamed(name, names):
    """A weight's name with its parts replaced by their other names."""
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def torchtune(row):
    """torchtune's llama2 or lora_llama2, with cross-entropy over all positions at once, as in its recipes."""
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama2 import llama2, lora_llama2
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    c = SIZES
    sizes = {
        "vocab_size": c.vocab_size, "num_layers": c.n_layers, "num_heads": c.n_heads, "num_kv_heads": c.n_heads,
        "embed_dim": c.dim, "max_seq_len": c.max_seq_len, "intermediate_dim": c.ffn_dim, "norm_eps": c.norm_eps,
    }  # fmt: skip
    if row.has("lora"):
        adapters = {"lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": LORA_DROPOUT}
        model = lora_llama2(list(LORA_TARGETS), **adapters, **sizes)
        set_trainable_params(model, get_adapter_params(model))
        for layer, block in enumerate(model.layers):
            for target in LORA_TARGETS:
                getattr(block.attn, target).lora_a.weight.data.copy_(workload.lora_a(layer, target))
    else:
        model = llama2(**sizes)
    own = hf_to_tune(workload.weights(), num_heads=c.n_heads, num_kv_heads=c.n_heads, dim=c.dim)
    model.load_state_dict(own, strict=False)

    def forward(tokens, labels):
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return F.cross_entropy(model(tokens).flatten(0, 1), shifted.flatten(), ignore_index=IGNORED)

    return model, forward


SIDES = {
    "transformers_loop": (transformers_loop, ["transformers", "peft"]),
    "litgpt": (litgpt, ["litgpt"]),
    "torchtune": (torchtune, ["torchtune", "torchao"]),
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    args = workload.arguments()
    build, packages = SIDES[args.side]
    workload.tell(args, workload.plain_loop(args, *build(args.row)), packages)
