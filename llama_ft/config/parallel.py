"""The config group `parallel`: over how many processes one run is split, and how."""

import enum
import re
from dataclasses import dataclass

from llama_ft.config.checks import check, check_settings, setting

# How a run is split over processes: not at all, each with the whole model, or each with a part of every weight.
Strategy = enum.Enum("Strategy", ["none", "ddp", "fsdp"])
SPLIT, SEVERAL_NODES = "parallel.strategy=ddp|fsdp", "parallel.nodes"


def check_rendezvous(given: str | None) -> None:
    """Raise a UserError unless it is HOST:PORT, or None."""
    match = re.fullmatch(r"[^\s:/]+:(\d{1,5})", str(given))
    holds = given is None or (match is not None and 0 < int(match[1]) < 2**16)
    check(holds, "parallel.rendezvous", given, "HOST:PORT, such as node1:29500, or null")


@dataclass
class ParallelConfig:
    """One run on several GPUs, or machines: a process for each GPU, started and watched by `torch.distributed.run`."""

    strategy: Strategy = setting(Strategy.none, "how it is split; the choice of the group sets it")
    processes: int = setting(2, "processes in all, one a GPU; on the CPU up to 8 a core", at_least=1, needs=SPLIT)
    nodes: int = setting(1, "machines that share the processes; the same command runs on each", at_least=1, needs=SPLIT)
    rendezvous: str | None = setting(
        None, "HOST:PORT of the first machine, where they meet; null takes SLURM's variables", needs=SEVERAL_NODES
    )
    timeout_s: int = setting(600, "seconds that others wait for a process before the run ends", at_least=1, needs=SPLIT)

    def __post_init__(self) -> None:
        check_settings(self, "parallel.")
        n = self.processes
        holds = self.world_size % self.nodes == 0
        check(holds, "parallel.processes", n, f"a multiple of parallel.nodes={self.nodes}")
        check_rendezvous(self.rendezvous)

    @property
    def is_split(self) -> bool:
        """Whether there is more than the run's own process."""
        return self.strategy is not Strategy.none

    @property
    def world_size(self) -> int:
        """Processes in all; 1 where the run is not split."""
        return self.processes if self.is_split else 1

    @property
    def per_machine(self) -> int:
        """Processes on each machine."""
        return self.world_size // self.nodes
