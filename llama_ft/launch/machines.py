"""A run on several machines: their meeting point, which of them is the first, and the folder that this one works in.

The same command runs on each. The first machine has rank 0, locks the run's folder and writes the results; each other
one logs into a folder in it, `other_machine_NAME`, since on a shared disk the run's folder is the same one.
"""

import errno
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ft.config import UserError
from llama_ft.config.parallel import check_rendezvous
from llama_ft.files import locked
from llama_ft.records.result import MACHINE
from llama_ft.system import Log

FIRST_PORT, N_PORTS = 20_000, 10_000  # of SLURM's jobs: below those that Linux assigns to connections


@dataclass(frozen=True)
class Place:
    """The locked folder that a command works in, and its part in a run on several machines."""

    run_dir: Path  # the run's, which may be another than this machine's
    folder: Path
    lock: int  # descriptor of the folder's lock
    listener: socket.socket | None = None  # on the first machine of several: the others connect to it

    @property
    def is_first(self) -> bool:
        """True if rank 0 is on this machine."""
        return self.folder == self.run_dir


@contextmanager
def held_place(parallel: Any, run_dir: Path, wait_seconds: float, log: Log) -> Iterator[Place]:
    """Lock the folder that this machine works in, as `files.locked` does; `parallel` may not be checked yet."""
    numbers = parallel.nodes, parallel.processes
    is_one = not all(isinstance(n, int) for n in numbers) or parallel.nodes < 2 or parallel.processes % parallel.nodes
    listener = None if is_one else listen_if_first(*meeting_point(parallel.rendezvous, parallel.nodes, os.environ))
    folder = run_dir if is_one or listener else run_dir / f"{MACHINE}{socket.gethostname()}"
    folder.mkdir(parents=True, exist_ok=True)
    with closing(listener) if listener else nullcontext(), locked(folder, wait_seconds, log) as lock:
        yield Place(run_dir, folder, lock, listener)


def meeting_point(given: str | None, nodes: int, variables: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of the first machine, by `parallel.rendezvous` or SLURM's variables; a UserError without both."""
    if given is not None:
        check_rendezvous(given)  # a run's config is checked later
        host, _, port = str(given).rpartition(":")
        return host, int(port)
    hosts, job = variables.get("SLURM_JOB_NODELIST"), variables.get("SLURM_JOB_ID", "")
    if not hosts or not job.isdigit():
        ways = "SLURM's srun, whose variables are not set, or parallel.rendezvous=HOST:PORT of the first machine"
        raise UserError(f"parallel.nodes={nodes} needs {ways}")
    if (n_there := int(variables.get("SLURM_NNODES", nodes))) != nodes:
        raise UserError(f"parallel.nodes={nodes}: SLURM gave this job {n_there}: give parallel.nodes={n_there}")
    if int(variables.get("SLURM_NTASKS", nodes)) != nodes or variables.get("SLURM_LOCALID", "0") != "0":
        advice = "run one command per machine, which starts its processes: srun --ntasks-per-node=1"
        raise UserError(f"parallel.nodes={nodes}: {advice}")
    return first_host(hosts), FIRST_PORT + int(job) % N_PORTS


def first_host(hosts: str) -> str:
    """The first host in SLURM's compact list: node03 in `node[03-05,9],login1`."""
    name = re.match(r"[^,\[]+", hosts)
    first = re.match(r"[^,\[]*\[(\d+)[^\]]*\]([^,\[]*)", hosts)
    return name[0] + (first[1] + first[2] if first else "") if name else hosts


def listen_if_first(host: str, port: int) -> socket.socket | None:
    """Open a socket for the other machines; None if this one is not HOST, or another command listens there."""
    try:
        address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"{host}, the first machine's name, is not known here: {error}") from error
    with socket.socket(address[0]) as probe:
        try:
            probe.bind(address[4])  # the address of another machine cannot be bound to
        except OSError:
            return None
    try:
        # On all addresses: a machine's own name may be that of its loopback, which no other reaches.
        both = address[0] == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(("", port), family=address[0], dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise UserError(f"the other machines cannot connect to {host}:{port}: {error.strerror}") from error
