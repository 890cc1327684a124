"""Keys and values of the tokens seen so far, kept for the next token.

A cache is an argument of the model's forward. It is preallocated for one generation, in attention's compute dtype:
2 * layers * batch * kv_heads * tokens * head_dim elements.
"""

import torch
from torch import Tensor

from llama_ft.config import ModelConfig


class NoCache:
    """Stands in for a cache where every position is computed."""

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return them unchanged."""
        return keys, values


class LayerCache:
    """One layer's keys and values, [B, K, T, E] each, filled from the left."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, [B, K, S, E]; return all, [B, K, length, E]. A ValueError if the cache is full."""
        start, end = self.length, self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the KV cache has room for {self.keys.shape[2]} tokens, not for {end}")
        self.keys.narrow(2, start, end - start).copy_(keys)
        self.values.narrow(2, start, end - start).copy_(values)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


class KVCache:
    """The cache of every layer, for `batch` sequences of `tokens` tokens, prompts included."""

    def __init__(
        self, config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (batch, config.n_kv_heads, tokens, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """Tokens stored so far."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        return sum(buffer.nbytes for layer in self.layers for buffer in (layer.keys, layer.values))

    def reorder(self, rows: Tensor) -> None:
        """Replace row i by row rows[i], int64 [B], as beam search continues from other hypotheses."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[:, :, : layer.length] = buffer[rows, :, : layer.length]
