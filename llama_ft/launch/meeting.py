"""The meeting of a run's agents: by a store on the first machine they tell each other how the run ended."""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from llama_ft.config import DeviceChoice, TrainConfig, UserError
from llama_ft.device import choose_device, why_no_gpu
from llama_ft.launch.endings import Ending, root_of
from llama_ft.launch.machines import meeting_point
from llama_ft.system import n_cores

POLL_SECONDS = 0.1
MOST_PER_CORE = 8  # processes on the CPU; each takes some 0.3 GB before its first tensor


class Meeting(StaticTCPRendezvous):
    """The machines of a run, once met; PyTorch's agent asks it for the store and for its machine's number."""

    def __init__(self, server: TCPStore, host: str, rank: int, config: TrainConfig, run_dir: str) -> None:
        timeout, self.n_machines = config.parallel.timeout_s, config.parallel.nodes
        super().__init__(host, server.port, rank, self.n_machines, "ranks", timeout)
        self._store = server
        self.n_here = config.parallel.per_machine
        self.host, self.run_dir, self.store = host, run_dir, PrefixStore("llama_ft", server)

    def settle(self, endings: Sequence[Ending], wait_seconds: float) -> Ending | None:
        """Return the cause of the run's end, which the first machine determines for all; None if it ended well.

        `endings` are this machine's. A machine that does not report its own within some seconds is silent.
        """
        if self.rank > 0:
            with suppress(DistError):
                self.store.set(f"endings_{self.rank}", json.dumps([asdict(each) for each in endings]))
                if waited(lambda: self.store.check(["root"]), 3 * wait_seconds):
                    root = json.loads(self.store.get("root"))
                    self.store.set(f"read_{self.rank}", "")
                    return Ending(**root) if root else None
            return root_of(endings) or self.without_first()
        everyone = list(endings)
        for machine in range(1, self.n_machines):
            key = f"endings_{machine}"
            if waited(partial(self.store.check, [key]), 2 * wait_seconds):
                everyone += [Ending(**each) for each in json.loads(self.store.get(key))]
            else:
                everyone.append(Ending(machine * self.n_here, "error", "its machine does not answer", "silent"))
        return root_of(everyone)

    def without_first(self) -> Ending:
        """The ending of a run whose first machine is lost."""
        return Ending(0, "error", f"the first machine, {self.host}, does not answer", "silent")

    def close(self, root: Ending | None, wait_seconds: float) -> None:
        """Tell the other machines how the run ended, and wait until they know."""
        if self.rank == 0 and self.n_machines > 1:
            self.store.set("root", json.dumps(root and asdict(root)))
            read = [f"read_{machine}" for machine in range(1, self.n_machines)]
            waited(lambda: self.store.check(read), wait_seconds)


def waited(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, and return whether it holds; unlike the store's own waiting, it can be interrupted."""
    end = time.monotonic() + seconds
    while not (is_so := condition()) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return is_so


def meet(config: TrainConfig, folder: str, listener: int | None) -> Meeting:
    """Wait until the agents of all machines are here; a UserError if they do not come, or have another config.

    Args:
        folder: the one that this machine works in: on the first, the run's.
        listener: descriptor of the socket that the others connect to; None on the others, and on a single machine.
    """
    parallel, seconds = config.parallel, config.parallel.timeout_s
    timeout = timedelta(seconds=seconds)
    if parallel.nodes == 1:
        own = socket.create_server(("127.0.0.1", 0))
        host, port, listener = "127.0.0.1", own.getsockname()[1], own.detach()
    else:
        host, port = meeting_point(parallel.rendezvous, parallel.nodes, os.environ)
    if listener is None:
        if not waited(lambda: answers(host, port), seconds):
            needed = "the same command must run on that machine, and its port be open"
            raise UserError(f"nothing answers at {host}:{port} after {seconds} s: {needed}")
        server = TCPStore(host, port, is_master=False, timeout=timeout)
        return come(server, host, config)
    server = TCPStore(host, port, is_master=True, master_listen_fd=listener, timeout=timeout, wait_for_workers=False)
    run_dir = str(Path(folder).absolute())
    meeting = Meeting(server, host, 0, config, run_dir)
    meeting.store.set("first", json.dumps({"hash": config.hash(), "run_dir": run_dir}))
    if not waited(lambda: meeting.store.add("come", 0) >= parallel.nodes - 1, seconds):
        came = 1 + meeting.store.add("come", 0)
        advice = "start the same command on each machine, or wait longer with parallel.timeout_s"
        raise UserError(f"parallel.nodes={parallel.nodes}: {came} came to {host}:{port} within {seconds} s; {advice}")
    meeting.store.set("all_here", "")
    return meeting


def come(server: TCPStore, host: str, config: TrainConfig) -> Meeting:
    """On a machine other than the first: check that the run is the same, and wait for the rest."""
    store: Store = PrefixStore("llama_ft", server)
    first = json.loads(store.get("first")) if waited(lambda: store.check(["first"]), 10) else {}
    if first.get("hash") != config.hash():
        raise UserError(f"the run on the first machine, {host}, is another one: run the same command on each")
    rank = store.add("come", 1)
    if rank >= config.parallel.nodes:
        raise UserError(f"parallel.nodes={config.parallel.nodes}: all had met at {host} before this one came")
    if not waited(lambda: store.check(["all_here"]), config.parallel.timeout_s):
        raise UserError(f"parallel.nodes={config.parallel.nodes}: not all of them came to {host} in time")
    return Meeting(server, host, rank, config, first["run_dir"])


def answers(host: str, port: int) -> bool:
    """Return True if something listens there."""
    try:
        socket.create_connection((host, port), 5).close()
    except OSError:
        return False
    return True


def check_gpus(config: TrainConfig) -> None:
    """Raise a UserError if there are fewer GPUs here than processes, or no GPUs and far fewer cores."""
    n_here = config.parallel.per_machine
    if config.gpu.device is DeviceChoice.cpu or why_no_gpu() is not None:
        choose_device(config.gpu)  # one that is not here is refused before a process starts
        if n_here > (most := MOST_PER_CORE * n_cores()):
            raise UserError(
                f"parallel.processes={config.parallel.processes}: that is {n_here} on this machine, which has"
                f" {n_cores()} cores and no GPU to use: give at most {most}"
            )
        return
    n_gpus = torch.cuda.device_count()
    if n_here > n_gpus:
        here = f"that is {n_here} on this machine, one per GPU, and PyTorch sees {n_gpus}"
        raise UserError(f"parallel.processes={config.parallel.processes}: {here}: give fewer processes, or gpu=cpu")
