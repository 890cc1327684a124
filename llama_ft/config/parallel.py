"""The config group `parallel`: the processes that a run is split over, and the strategy."""

import enum
import re
from dataclasses import dataclass

from llama_ft.config.checks import check, check_settings, setting

# Split of a run over processes: none, the whole model on each, or a part of every weight on each.
Strategy = enum.Enum("Strategy", ["none", "ddp", "fsdp"])
SPLIT, SEVERAL_NODES = "parallel.strategy=ddp|fsdp", "parallel.nodes"


def check_rendezvous(given: str | None) -> None:
    """Raise a UserError unless the rendezvous is HOST:PORT or None."""
    match = re.fullmatch(r"[^\s:/]+:(\d{1,5})", str(given))
    holds = given is None or (match is not None and 0 < int(match[1]) < 2**16)
    check(holds, "parallel.rendezvous", given, "HOST:PORT, such as node1:29500, or null")


@dataclass
class ParallelConfig:
    """One run on several GPUs, or machines: a process for each GPU, started and watched by `torch.distributed.run`."""

    strategy: Strategy = setting(Strategy.none, "how the run is split; parallel=NAME sets it")
    processes: int = setting(2, "processes in all, one per GPU; on the CPU at most 8 per core", at_least=1, needs=SPLIT)
    nodes: int = setting(1, "machines that share the processes; the same command runs on each", at_least=1, needs=SPLIT)
    rendezvous: str | None = setting(
        None, "HOST:PORT of the first machine, where they meet; null uses SLURM's variables", needs=SEVERAL_NODES
    )
    timeout_s: int = setting(600, "seconds to wait for another process before the run ends", at_least=1, needs=SPLIT)

    def __post_init__(self) -> None:
        check_settings(self, "parallel.")
        holds = self.world_size % self.nodes == 0
        check(holds, "parallel.processes", self.processes, f"a multiple of parallel.nodes={self.nodes}")
        check_rendezvous(self.rendezvous)

    @property
    def is_split(self) -> bool:
        """True if the run is split over several processes."""
        return self.strategy is not Strategy.none

    @property
    def world_size(self) -> int:
        """Processes in all; 1 if the run is not split."""
        return self.processes if self.is_split else 1

    @property
    def per_machine(self) -> int:
        """Processes on each machine."""
        return self.world_size // self.nodes
