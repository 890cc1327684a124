"""Sequences that grow one token at a time: prefill and step, with or without a KV cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_ft.model.kv_cache import KVCache
from llama_ft.model.transformer import Transformer

PADDING = 0  # any id will do: no real token attends to it


class GenerationState:
    """A batch of sequences and the model's logits of their next tokens.

    Prompts of different lengths are padded on the left, so that all end, and grow, at the same position. With a cache,
    the first call computes the prompts (prefill) and each later call a single token (a step); without one, every call
    recomputes all positions.
    """

    def __init__(self, model: Transformer, prompts: Sequence[list[int]], max_new_tokens: int, kv_cache: bool) -> None:
        """Store the prompts' token ids, without computing yet. A cache has room for at most `max_new_tokens` more."""
        self._model = model
        device, dtype = model.output.weight.device, model.output.weight.dtype
        lengths = [len(prompt) for prompt in prompts]
        self.prompt_length = max(lengths)
        padded = [[PADDING] * (self.prompt_length - len(prompt)) + prompt for prompt in prompts]
        self.tokens = torch.tensor(padded, device=device)  # int64 [B, T]
        self.n_prompt = torch.tensor(lengths, device=device)  # int64 [B]
        self._n_padding = self.prompt_length - self.n_prompt
        self._is_padded = min(lengths) < self.prompt_length
        room = self.prompt_length + max_new_tokens
        self.cache = KVCache(model.config, len(prompts), room, dtype, device) if kv_cache else None

    def next_logits(self) -> Tensor:
        """The logits of each sequence's next token, fp32 [B, V]."""
        start = self.cache.length if self.cache is not None else 0
        new = self.tokens[:, start:]
        batch, n_new = new.shape
        last = torch.arange(1, batch + 1, device=new.device) * n_new - 1
        positions, mask = self._positions(start) if self._is_padded else (None, None)
        logits = self._model(new, positions=positions, mask=mask, kv_cache=self.cache, logits_at=last)
        return logits.float()  # type: ignore[no-any-return]

    def _positions(self, start: int) -> tuple[Tensor, Tensor]:
        """Positions [B, S] of the tokens from `start` on, not counting padding, and their attention mask."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        queries, padding = columns[start:], self._n_padding[:, None]
        # A sequence that has ended may continue, past the context, for as long as the others last.
        positions = (queries - padding).clamp(0, self._model.config.max_seq_len - 1)
        is_real = (columns >= padding)[:, None, None, :]  # [B, 1, 1, T]
        # Padding attends only to itself: attention to nothing is NaN, which would reach the real tokens.
        itself = queries[:, None] == columns
        return positions, (is_real & (columns <= queries[:, None])) | itself

    def append(self, tokens: Tensor) -> None:
        """Append a token, int64 [B], to each sequence."""
        self.tokens = torch.cat((self.tokens, tokens[:, None]), dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Replace sequence i by sequence rows[i], int64 [B]."""
        self.tokens, self.n_prompt = self.tokens[rows], self.n_prompt[rows]
        self._n_padding = self._n_padding[rows]
        if self.cache is not None:
            self.cache.reorder(rows)

    def seen(self) -> Tensor:
        """The ids that each sequence contains, without padding: bool [B, V]."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        is_real = columns >= self._n_padding[:, None]
        counts = torch.zeros(len(self.tokens), self._model.config.vocab_size, device=self.tokens.device)
        return counts.scatter_add_(1, self.tokens, is_real.float()) > 0
