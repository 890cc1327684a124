"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): keep a block's input, recompute the rest in backward.

`every=n` keeps the input of every n-th block. Then n blocks are recomputed together, and their activations are in
memory together; docs/gradient_checkpointing.md shows why n = 1, not the textbook's sqrt(L), is best for LLaMA.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from llama_ft.config.checks import Offload, Policy
from llama_ft.config.techniques import GradientCheckpointingConfig
from llama_ft.model.attention import Mask
from llama_ft.model.transformer import Caches, Transformer
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.techniques.offload import offloading, pinned_copy

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)  # last argument: [summed over, features]


def apply(model: Transformer, config: GradientCheckpointingConfig, precision: Precision) -> None:
    """Checkpoint the layers as the config says."""
    checkpoint_layers(model, config.every, config.policy is Policy.selective, config.offload is Offload.cpu)


def checkpoint_layers(model: Transformer, every: int = 1, selective: bool = False, offload: bool = False) -> None:
    """Make the model run its layers in checkpointed groups.

    Args:
        every: layers in a group; a UserError unless it is at least 1.
        selective: also keep the results of large matrix products, so that only cheap operations are recomputed.
        offload: keep the inputs of groups on a GPU in the host's memory.
    """
    GradientCheckpointingConfig(every)  # checks it
    model.run_layers = CheckpointedLayers(model.run_layers, every, selective, offload)


class CheckpointedLayers:
    """Runs layers in checkpointed groups, each with the function that ran all layers before."""

    def __init__(self, run_group: Callable[..., Tensor], every: int, selective: bool, offload: bool) -> None:
        self.run_group, self.every, self.selective, self.offload = run_group, every, selective, offload
        self.copy_of = pinned_copy  # an attribute, so that plans can replace it for GPUs that this machine lacks

    def __call__(self, layers: nn.ModuleList, x: Tensor, turns: Tensor, mask: Mask, caches: Caches) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        inputs: AbstractContextManager[object] = offloading(self.copy_of) if self.offload else nullcontext()
        for start in range(0, len(layers), self.every):
            group = slice(start, start + self.every)
            run = partial(self.run_group, layers[group], turns=turns, mask=mask, caches=caches[group])
            contexts = partial(_keeping_products, layers[group]) if self.selective else noop_context_fn
            with inputs:  # sees the tensor that a checkpoint saves: x
                # Non-reentrant: under LoRA the embeddings are frozen, so the first block's input needs no gradient, and
                # the reentrant form would then compute no weight's gradient.
                x = checkpoint(run, x, use_reentrant=False, context_fn=contexts)
        return x


def _keeping_products(layers: Any) -> Any:
    """Contexts of a group's forward pass and of its recomputation, which reuses the products that the first one keeps.

    Products that sum over at least model.dim features are kept: each of their numbers costs as much to compute as a
    weight's product. LoRA's B sums only over its rank. The result of w2, which ends a group, is not recomputed anyway
    unless w2 trains more than its weight.
    """
    least, w2 = layers[0].attention.wq.in_features, layers[-1].feed_forward.w2
    ends_early = len(layers) == 1 and not any(p.requires_grad for name, p in w2.named_parameters() if name != "weight")
    most = w2.in_features - 1 if ends_early else float("inf")

    def policy(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        keep = operator in PRODUCTS and least <= args[-1].shape[0] <= most
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
