"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): keep a block's input, recompute the rest in backward.

`every=n` keeps the input of every n-th block. A run of n blocks is then recomputed at once, so that the activations of
n blocks live at a time; docs/gradient_checkpointing.md shows why n = 1, not the textbook's sqrt(L), is best for LLaMA.
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama_ft.config import GradientCheckpointingConfig
from llama_ft.model.attention import Mask
from llama_ft.model.transformer import Caches, Transformer
from llama_ft.techniques.mixed_precision import Precision


def apply(model: Transformer, config: GradientCheckpointingConfig, precision: Precision) -> None:
    """Checkpoint the layers as the config says."""
    checkpoint_layers(model, config.every)


def checkpoint_layers(model: Transformer, every: int = 1) -> None:
    """Make the model run its layers in checkpointed groups of `every`; a UserError unless it is at least 1."""
    GradientCheckpointingConfig(every)  # checks it
    run_group = model.run_layers

    def run_checkpointed(layers: nn.ModuleList, x: Tensor, turns: Tensor, mask: Mask, caches: Caches) -> Tensor:
        for start in range(0, len(layers), every):
            group = slice(start, start + every)
            # The non-reentrant form: under LoRA the embeddings are frozen, so the first block's input needs no
            # gradient, and the reentrant form would then give none to any weight of any block.
            x = checkpoint(run_group, layers[group], x, turns, mask, caches[group], use_reentrant=False)
        return x

    model.run_layers = run_checkpointed
