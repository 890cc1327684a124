"""Choice of a run's GPU: one that no other run has, so that rows that run side by side measure a card each."""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from llama_ft.config import DeviceChoice, GpuConfig, UserError
from llama_ft.device import gpu_index, why_no_gpu
from llama_ft.files import explained, try_lock
from llama_ft.system import Log

POLL_SECONDS = 1.0


def take_card(gpu: GpuConfig, log: Log) -> IO[bytes] | None:
    """Set `gpu.index` to a card that no other run has; wait for one if other runs have all.

    The returned file holds it until closed, or the process ends. None if there is no card, or it is to be shared.
    """
    held = _taken(gpu, 1, log)
    for gpu.index in held:
        return held[gpu.index]
    return None


def take_cards(gpu: GpuConfig, n: int, log: Log) -> list[IO[bytes]]:
    """Hold n cards that no other run has, and let processes started from now on see only them."""
    held = _taken(gpu, n, log)
    if held:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number] if visible else str(number) for number in held)
    return list(held.values())


def _taken(gpu: GpuConfig, n: int, log: Log) -> dict[int, IO[bytes]]:
    """The lock of each card, by PyTorch's number; empty if there is no card, or they are to be shared."""
    if gpu.shared or gpu.device is DeviceChoice.cpu or why_no_gpu():
        return {}
    folder = Path(tempfile.gettempdir()) / f"llama_ft_gpus_{os.getuid()}"
    with explained(f"the locks of GPUs cannot be kept in {folder}, of TMPDIR; gpu.shared=true needs none"):
        folder.mkdir(mode=0o700, exist_ok=True)
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        alike = [n for n, card in enumerate(cards) if card.name == cards[0].name]  # as a table's rows must be
        wanted = alike if gpu.index is None else [gpu_index(gpu)]
        return hold({number: str(cards[number].uuid) for number in wanted}, n, folder, log)


def hold(cards: Mapping[int, str], n: int, folder: Path, log: Log) -> dict[int, IO[bytes]]:
    """Lock the first n free cards, by files in the folder named by the cards' ids; wait until that many are free.

    All are taken at once, or none: two runs that each held some would wait for each other. A UserError if there are
    fewer cards.
    """
    if n > len(cards):
        raise UserError(f"{n} GPUs of one kind are needed, and this machine has {len(cards)}")
    n_looks = 0
    while True:
        files = {number: (folder / card).open("ab") for number, card in cards.items()}
        free = [number for number, file in files.items() if try_lock(file)][:n]
        kept = free if len(free) == n else []
        for number in files.keys() - set(kept):
            files[number].close()
        if kept:
            return {number: files[number] for number in kept}
        if n_looks == 0:
            which = "GPU is" if len(cards) == 1 else f"{len(cards)} GPUs are all" if n == 1 else "GPUs are"
            log(f"waiting: the {which} taken by other runs; gpu.shared=true shares one")
        n_looks += 1
        time.sleep(POLL_SECONDS)
