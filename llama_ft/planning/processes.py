"""Runs planning jobs on all cores, each in its own process."""

import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from llama_ft.config import UserError
from llama_ft.system import n_cores

MAX_PROCESSES = 8
K = TypeVar("K")
T = TypeVar("T")


def side_by_side(function: Callable[..., T], jobs: Mapping[K, tuple[Any, ...]]) -> Iterator[tuple[K, T]]:
    """Call a function with each job's arguments, a job per core; yield results as they come; raise a job's error."""
    n_processes = min(len(jobs), n_cores(), MAX_PROCESSES)
    if n_processes < 2:
        for key, arguments in jobs.items():
            yield key, function(*arguments)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(["llama_ft.planning.worker"])
    others = set(active_children())  # the caller's
    pool = ProcessPoolExecutor(n_processes, context, _begin)
    try:
        futures = {pool.submit(function, *arguments): key for key, arguments in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException as error:
        for process in set(active_children()) - others:  # their results are not needed
            process.terminate()
        if isinstance(error, UserError):
            raise error from None  # without the other process's traceback
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    torch.set_num_threads(1)
