"""Simulates one of a run's processes without the others: its communication is counted but not sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_ft.config import ParallelConfig, Strategy
from llama_ft.parallel.ranks import ALONE, Ranks
from llama_ft.system import MIB

BUCKETS = [MIB, 25 * MIB]  # bytes of DDP's first bucket, and of the others (`bucket_cap_mb`)


@dataclass(frozen=True)
class FakeRanks(Ranks):
    """The first of the planned processes, which has at least as many rows and samples as any other."""

    @property
    def is_alone(self) -> bool:
        """False, so that communication is counted."""
        return False

    def total(self, number: int) -> int:
        """This process's own number, since a fake tensor has no value."""
        return number


def first_rank(config: ParallelConfig) -> Ranks:
    """The first process of a planned run."""
    if not config.is_split:
        return ALONE
    strategy = config.strategy if config.strategy is Strategy.fsdp else Strategy.none  # `Buckets` are DDP's
    return FakeRanks(strategy, 0, config.world_size)


@contextmanager
def fake_processes(config: ParallelConfig) -> Iterator[Ranks]:
    """The first process of a planned run, with PyTorch's fake process group of the run's size inside the block."""
    if config.is_split:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=config.world_size, store=FakeStore())
    try:
        yield first_rank(config)
    finally:
        if config.is_split:
            dist.destroy_process_group()


class Buckets(nn.Module):
    """DDP's memory and communication around a model of fake tensors, which DDP's own C++ code does not support.

    Buckets are always alive. In the backward pass that sums, each gradient is computed outside and copied into one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.require_backward_grad_sync = model, True
        parameters: list[Tensor] = [each for each in reversed(list(model.parameters())) if each.requires_grad]
        assigned, _ = dist._compute_bucket_assignment_by_size(parameters, BUCKETS)  # type: ignore[attr-defined]
        self.buckets: list[Tensor] = []
        self.views: dict[Tensor, Tensor] = {}  # into a bucket, by parameter
        for indices in assigned:
            members = [parameters[index] for index in indices]
            bucket = torch.empty(sum(each.numel() for each in members), dtype=members[0].dtype)
            self.buckets.append(bucket)
            first, awaited = 0, {id(each) for each in members}
            for each in members:
                view = bucket[first : first + each.numel()].view_as(each)
                each.register_post_accumulate_grad_hook(self._hook(bucket, view, awaited, frozenset(awaited)))
                self.views[each] = view
                first += each.numel()

    def _hook(self, bucket: Tensor, view: Tensor, awaited: set[int], members: frozenset[int]) -> Any:
        def hook(parameter: Tensor) -> None:
            if self.require_backward_grad_sync:
                assert parameter.grad is not None
                view.copy_(parameter.grad)
                parameter.grad = view
                awaited.discard(id(parameter))
                if not awaited:
                    dist.all_reduce(bucket)
                    awaited.update(members)

        return hook

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)
