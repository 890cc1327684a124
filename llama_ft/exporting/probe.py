"""What rounding weights does to a model: its logits on a batch of tokens, with weights read layer by layer."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llama_ft.config import ModelConfig
from llama_ft.model.stored import Weight
from llama_ft.model.transformer import EMBEDDING, OUTPUT, Transformer, rotary_table

ROWS, LENGTH = 4, 64  # of the batch: random tokens, since there may be no tokenizer


@dataclass(frozen=True)
class Change:
    """What rounding did to the logits of all positions of the batch."""

    largest: float
    mean: float
    largest_logit: float
    n_positions: int
    n_other_token: int  # positions at which another token is the most probable one

    def describe(self) -> str:
        """For people."""
        return (
            f"rounding the weights changed the logits by {self.largest:.2g} at most and {self.mean:.2g} on average (the"
            f" largest is {self.largest_logit:.3g}), and the most probable token at {self.n_other_token} of"
            f" {self.n_positions} positions of {ROWS} x {min(LENGTH, self.n_positions // ROWS)} random tokens"
        )


@torch.no_grad()
def change(
    config: ModelConfig, exact: Mapping[str, Weight], rounded: Mapping[str, Weight], advance: Callable[[int], None]
) -> Change:
    """Compare a model's logits before and after rounding its weights, both computed in fp32, or fp64 if those are."""
    length = min(LENGTH, config.max_seq_len)
    tokens = torch.randint(config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))
    dtype = functools.reduce(torch.promote_types, {weight.dtype for weight in exact.values()}, torch.float32)
    before, after = (streamed(config, weights, length, dtype, advance)(tokens) for weights in (exact, rounded))
    difference = (after - before).abs()
    others = (before.argmax(-1) != after.argmax(-1)).sum().item()
    return Change(
        difference.max().item(), difference.mean().item(), before.abs().max().item(), tokens.numel(), int(others)
    )


def streamed(
    config: ModelConfig,
    weights: Mapping[str, Weight],
    context: int,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> Transformer:
    """The model for so long a context, that computes in the dtype and reads its matrices whenever it needs them."""
    config = replace(config, max_seq_len=context)
    with torch.device("meta"):
        model = Transformer(config)
    model.rotary = rotary_table(config)
    for name, module in list(model.named_modules()):
        weight = weights.get(f"{name}.weight", weights[EMBEDDING])  # of a tied output the embedding's
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), child, _StreamedLinear(weight.as_dtype(dtype), advance))
        elif isinstance(module, nn.Embedding):
            setattr(model.get_submodule(parent), child, _StreamedEmbedding(weight.as_dtype(dtype), advance))
        elif f"{name}.weight" in weights:
            gains = torch.cat([rows for _, rows in weight.as_dtype(dtype).pieces(1)])
            setattr(module, "weight", nn.Parameter(gains))  # noqa: B010
    return model


class _StreamedLinear(nn.Module):
    def __init__(self, weight: Weight, advance: Callable[[int], None]) -> None:
        super().__init__()
        self._weight, self._advance = weight, advance

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self._weight.shape[0])
        for first, rows in self._weight.pieces(1):
            y[..., first : first + len(rows)] = x @ rows.T
            self._advance(rows.numel())
        return y


class _StreamedEmbedding(nn.Module):
    def __init__(self, weight: Weight, advance: Callable[[int], None]) -> None:
        super().__init__()
        self._weight, self._advance = weight, advance

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.empty(*tokens.shape, self._weight.shape[1], dtype=self._weight.dtype)
        for first, rows in self._weight.pieces(1):
            here = (tokens >= first) & (tokens < first + len(rows))
            x[here] = rows[tokens[here] - first]
            self._advance(rows.numel())
        return x


def n_read(weights: Mapping[str, Weight], config: ModelConfig) -> int:
    """How many elements a streamed model of these weights reads in all."""
    again = [weights[EMBEDDING]] if config.tie_word_embeddings and OUTPUT not in weights else []
    matrices = [weight for weight in weights.values() if len(weight.shape) == 2]
    return sum(weight.shape[0] * weight.shape[1] for weight in matrices + again)
