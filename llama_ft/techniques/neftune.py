"""NEFTune (Jain et al. 2023, arXiv 2310.05914): noise on the embeddings, only during training.

Each value of a sequence's embeddings gets independent noise, uniform in [-1, 1], times alpha / sqrt(L d), for L tokens
of d features (the paper's algorithm 1). The norm of a sequence's noise is then about alpha / sqrt(3), for any
L and d.

For packed sequences L is each sequence's own length; for a padded batch L is the batch's width, padding included. The
README of the paper's code (github.com/neelsjain/NEFTune) and transformers' `neftune_post_forward_hook` do the same,
although the algorithm uses each sequence's own length.
"""

import math

import torch
from torch import Tensor, nn

from llama_ft.config import NeftuneConfig, UserError
from llama_ft.model.attention import Mask, Segments
from llama_ft.model.transformer import Transformer
from llama_ft.model.transformer import embed as plain_embed
from llama_ft.techniques.mixed_precision import Precision


def apply(model: Transformer, config: NeftuneConfig, precision: Precision) -> None:
    """Train the model on noisy embeddings, as the config says."""
    add_noise(model, config.alpha)


def add_noise(model: Transformer, alpha: float = 5.0) -> None:
    """Add noise to a model's embeddings in training mode; a UserError unless alpha is positive, or if done before."""
    NeftuneConfig(alpha)  # checks it
    if model.embed is not plain_embed:
        raise UserError("the model has noise on its embeddings already")
    embed = model.embed

    def embed_noisily(embeddings: nn.Module, tokens: Tensor, mask: Mask) -> Tensor:
        x = embed(embeddings, tokens, mask)
        return x + noise_like(x, mask, alpha) if embeddings.training else x

    model.embed = embed_noisily


def noise_like(x: Tensor, mask: Mask, alpha: float) -> Tensor:
    """Noise for embeddings [B, S, D], drawn from PyTorch's global random state in x's dtype; mask as in the model."""
    noise, start = torch.empty_like(x), 0
    for length in mask.lengths if isinstance(mask, Segments) else x.shape[1:2]:
        bound = alpha / math.sqrt(length * x.shape[2])
        noise.narrow(1, start, length).uniform_(-bound, bound)
        start += length
    return noise
