"""The decoder of LLaMA 2 (Touvron et al. 2023, arXiv 2307.09288) and of Llama 3 (Meta 2024, arXiv 2407.21783).

Mistral's is the same, Qwen 2's adds biases, Qwen 3's adds query and key norms. Parameters have the names of Meta's
checkpoints, or of transformers where Meta has none.

Shapes: B batch, S sequence, D model.dim, H n_heads, K n_kv_heads, E head_dim, F ffn_dim, V vocab_size,
N positions whose logits are requested.
"""

import math
from collections.abc import Sequence, Set

import torch
from torch import Tensor, nn

from llama_ft.config import ModelConfig
from llama_ft.kernels import at_least_fp32
from llama_ft.model.attention import Mask, Segments, attend, repeats_keys, takes_segments
from llama_ft.model.autograd import rms_norm, swiglu
from llama_ft.model.kv_cache import KVCache, LayerCache, NoCache

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"  # one parameter if tied


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in fp32 and returned in x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]. Rounds to x's dtype before the gain, as Meta's code and transformers do."""
        return rms_norm(x, self.weight, self.eps)


def rotary_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position for each pair of a head's features (Su et al. 2021, arXiv 2104.09864): fp32, [E / 2].

    Llama 3.1's scaling, after Meta's `apply_scaling`: a pair that turns at most `rope_low_freq_factor` times in
    `rope_original_context` tokens turns `rope_factor` times slower, one that turns at least `rope_high_freq_factor`
    times is unchanged, and the two are interpolated in between.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = config.rope_theta**-exponents
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = frequencies * config.rope_original_context / (2 * math.pi)
    left_alone = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * torch.lerp(torch.full_like(turns, 1 / config.rope_factor), torch.ones_like(turns), left_alone)


def rotary_table(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Cosine and sine of the rotary angles: fp32, [context, E / 2, 2]."""
    device = device or torch.get_default_device()
    if device.type == "meta":  # arange on it would import all of torch's compiler, which takes seconds
        return torch.empty(config.max_seq_len, config.head_dim // 2, 2, dtype=torch.float32, device=device)
    positions = torch.arange(config.max_seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rotary_frequencies(config, device))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn adjacent pairs of features (Meta's layout) by their position's angles: a complex product, as in Meta's code.

    x is [B, S, heads, E]; turns is complex, [S, 1, E / 2] or [B, S, 1, E / 2]. Computed in fp32, returned in x's dtype.
    """
    pairs = torch.view_as_complex(at_least_fp32(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245); multi-head where K = H."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group_size = config.n_heads // config.n_kv_heads  # query heads that share a head of keys and values
        # Attributes, so that plans can replace them for other devices and attention can be hidden from a compiler.
        self.repeats_keys, self.takes_segments, self.attend = repeats_keys, takes_segments, attend
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(q_dim, config.dim, bias=False)
        # Per head, as in transformers' Qwen3Attention.
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, turns: Tensor, mask: Mask, cache: LayerCache | NoCache) -> Tensor:
        """[B, S, D] to [B, S, D]; mask as in `Transformer.forward`."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # [B, S, H or K, E]
        # Under autocast a norm with an fp32 weight returns fp32, but attention needs one dtype.
        q, k = (rotate(t, turns).to(v.dtype) for t in (self.q_norm(q), self.k_norm(k)))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H or K, S, E]
        k, v = cache.extend(k, v)  # [B, K, T, E], T = S without a cache
        if self.group_size > 1 and self.repeats_keys(q, mask):
            k, v = (t.repeat_interleave(self.group_size, dim=1) for t in (k, v))
        out = self.attend(q, k, v, mask, isinstance(mask, Segments) and self.takes_segments(q))
        return self.wo(out.flatten(-2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, turns: Tensor, mask: Mask, cache: LayerCache | NoCache) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        x = x + self.attention(self.attention_norm(x), turns, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))  # type: ignore[no-any-return]


def embed(embeddings: nn.Module, tokens: Tensor, mask: Mask) -> Tensor:
    """int64 [B, S] to [B, S, D]; mask as in `Transformer.forward`."""
    return embeddings(tokens)  # type: ignore[no-any-return]


Caches = Sequence[LayerCache | NoCache]  # one for each layer


def run_layers(layers: nn.ModuleList, x: Tensor, turns: Tensor, mask: Mask, caches: Caches) -> Tensor:
    """[B, S, D] through the layers, one after the other."""
    for layer, cache in zip(layers, caches, strict=True):
        x = layer(x, turns, mask, cache)
    return x


class Transformer(nn.Module):
    """The decoder with its embedding and head.

    `embed` and `run_layers` are attributes so that techniques can replace them.
    """

    rotary: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding's own initialization on the meta device would import all of torch's compiler.
        empty = torch.empty(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, _weight=empty)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.embed, self.run_layers = embed, run_layers
        # Recomputed from the config and never saved: only some of Meta's checkpoints hold it.
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self.tie()

    def tie(self) -> None:
        """Share the embedding's weight with the output layer if the config says so; call again if a move parts them."""
        if self.config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def untie(self, changed: Set[str]) -> None:
        """Give the output layer its own weight if it shares one and is among the parameters to be changed."""
        if OUTPUT in changed and self.output.weight is self.tok_embeddings.weight:
            self.output.weight = nn.Parameter(self.output.weight.detach().clone())

    def _rotary_at(self, start: int, length: int, positions: Tensor | None, mask: Mask) -> Tensor:
        """The rotary table's rows for the new tokens: [S, E / 2, 2] or [B, S, E / 2, 2]."""
        if positions is not None:
            return self.rotary[positions]
        if isinstance(mask, Segments):
            return mask.rotary(self.rotary)
        if start + length > self.config.max_seq_len:
            raise ValueError(f"{start + length} tokens exceed the model's context of {self.config.max_seq_len}")
        return self.rotary[start : start + length]

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask = None,
        kv_cache: KVCache | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 [B, S]; with a cache, those that it does not hold yet.
            positions: int64 [S] or [B, S], each token's position; None counts from the cache's length, or from 0 in
                each of `Segments`.
            mask: bool, broadcast to [B, H, S, T], True where a query (third axis) may attend to one of T keys: those
                in the cache and the S new ones; None is causal. Padding on the right needs no mask, since no real
                token attends to it. `Segments`, for B = 1 and no cache: sequences packed end to end.
            kv_cache: keys and values of the tokens before these; the new ones are added to it.
            logits_at: int64 [N], indices into the B * S flattened positions; None is all.

        Returns:
            Logits in the compute dtype: [B, S, V], or [N, V] with `logits_at`.

        Raises:
            ValueError: if the tokens exceed the model's context and no positions are given, or the cache's room.
        """
        start, length = kv_cache.length if kv_cache else 0, tokens.shape[-1]
        rotary = self._rotary_at(start, length, positions, mask)
        if mask is None and start and length > 1:  # causal, starting after the cached tokens
            mask = torch.ones(length, start + length, dtype=torch.bool, device=tokens.device).tril(start)
        caches: Caches = kv_cache.layers if kv_cache else [NoCache()] * len(self.layers)
        turns = torch.view_as_complex(at_least_fp32(rotary)).unsqueeze(-2)  # one angle for all heads
        x = self.run_layers(self.layers, self.embed(self.tok_embeddings, tokens, mask), turns, mask, caches)
        if logits_at is not None:
            x = x.flatten(0, 1)[logits_at]
        return self.output(self.norm(x))  # type: ignore[no-any-return]
