"""The processes that share a run, and their communication."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from llama_ft.config import ParallelConfig, Strategy


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; by default it is alone, and nothing is exchanged.

    All processes have to call a method that exchanges something. Numbers go over the host (gloo), tensors over their
    own device, so that no process waits for its GPU.
    """

    strategy: Strategy = Strategy.none
    rank: int = 0
    world_size: int = 1

    @property
    def is_alone(self) -> bool:
        """True if the run is not split."""
        return self.strategy is Strategy.none

    @property
    def is_first(self) -> bool:
        """True for the process that reports and writes for the run."""
        return self.rank == 0

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        if self.is_alone:
            return number
        total = torch.tensor(number)
        self.add_up(total)
        return int(total)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if not self.is_alone:
            torch.distributed.all_reduce(tensor)

    def any(self, holds: bool) -> bool:
        """Return True if something holds in any process."""
        return self.total(int(holds)) > 0

    def gathered(self, value: Any) -> list[Any]:
        """Collect a value from each process, in the order of ranks."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.total(0)


ALONE = Ranks()


@contextmanager
def joined(config: ParallelConfig, device: torch.device) -> Iterator[Ranks]:
    """Join the processes of a run by the variables that `torch.distributed.run` sets; leave them after the block."""
    if not config.is_split:
        yield ALONE
        return
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    backend, timeout = "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timedelta(seconds=config.timeout_s)
    torch.distributed.init_process_group(backend, timeout=timeout, device_id=device if on_cuda else None)
    yield Ranks(config.strategy, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    torch.distributed.destroy_process_group()  # not after an error: it could wait for processes that are gone
