"""Splitting the model of a run over its processes, by one of PyTorch's engines.

FSDP (Zhao et al. 2023, arXiv 2304.11277; Rajbhandari et al. 2020, arXiv 1910.02054, stage 3) in PyTorch's second form,
`fully_shard`: each process holds its rows of every weight, gradient and moment. The rows of an attention or a
feed-forward are gathered before it computes and freed after it, in the forward and in the backward pass; gradients are
summed and each process keeps its rows of them.

DDP (Li et al. 2020, arXiv 2006.15704): each process holds the whole model, and the gradients are summed during the
backward pass of the last micro-batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_ft.config import Strategy
from llama_ft.model.four_bit import is_in_4_bits
from llama_ft.model.transformer import Attention, FeedForward, RMSNorm, Transformer
from llama_ft.parallel.ranks import Ranks
from llama_ft.techniques.mixed_precision import Precision


def shard(model: Transformer, ranks: Ranks, precision: Precision) -> None:
    """Under FSDP, split a model's parameters by rows; the model is on the meta device, with its techniques applied.

    Weights that autocast would cast are gathered in the 16-bit format, which is half the bytes, and not kept until the
    backward pass, as autocast's copies would be. Norms and the embedding are used as they are stored.
    """
    if ranks.strategy is not Strategy.fsdp:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(precision.device_type, (ranks.world_size,))
    casts = precision.compute != torch.float32 and not is_in_4_bits(model)
    stored = MixedPrecisionPolicy(cast_forward_inputs=False)
    cast = MixedPrecisionPolicy(precision.compute, torch.float32, cast_forward_inputs=False) if casts else stored
    for part in [each for each in model.modules() if isinstance(each, Attention | FeedForward)]:
        for norm in [each for each in part.modules() if isinstance(each, RMSNorm)]:
            fully_shard(norm, mesh=mesh, mp_policy=stored)
        fully_shard(part, mesh=mesh, mp_policy=cast)
    if not model.config.tie_word_embeddings:
        fully_shard(model.tok_embeddings, mesh=mesh, mp_policy=stored)
        fully_shard(model.output, mesh=mesh, mp_policy=cast)
    # Otherwise the root's own parameters would stay gathered after an evaluation, which no backward pass follows.
    fully_shard(model, mesh=mesh, mp_policy=stored, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the targets of all processes
            module.set_force_sum_reduction_for_comms(True)


def replicate(model: Transformer, ranks: Ranks) -> nn.Module:
    """The module to call in place of a model: DDP's wrapper of it, or the model itself."""
    if ranks.strategy is not Strategy.ddp:
        return model
    from torch.nn.parallel import DistributedDataParallel

    device = model.rotary.device
    wrapper = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        init_sync=False,  # all processes have read the same weights
        gradient_as_bucket_view=True,
    )
    wrapper.register_comm_hook(None, _add_up)
    return wrapper


def sum_after(module: nn.Module, is_last: bool) -> None:
    """Tell DDP whether the next backward pass is a window's last: it sums the gradients only then."""
    if (wrapper := vars(module)).get("require_backward_grad_sync") is not None:
        wrapper["require_backward_grad_sync"] = is_last


def _add_up(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Sum a bucket's gradients over all processes; DDP's own hook would average them."""
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
