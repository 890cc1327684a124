"""Which GPU a run takes: one that no other run has, so that rows that run side by side measure a card each."""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from llama_ft.config import DeviceChoice, GpuConfig
from llama_ft.device import gpu_index, why_no_gpu
from llama_ft.files import explained, try_lock
from llama_ft.system import Log

POLL_SECONDS = 1.0


def take_card(gpu: GpuConfig, log: Log) -> IO[bytes] | None:
    """Set `gpu.index` to a card of the run's own; wait for one where other runs have all.

    What is returned holds it until closed, or the process ends. None where there is no card, or it is to be shared.
    """
    if gpu.shared or gpu.device is DeviceChoice.cpu or why_no_gpu():
        return None
    folder = Path(tempfile.gettempdir()) / f"llama_ft_gpus_{os.getuid()}"
    with explained(f"which GPUs are taken cannot be kept in {folder}, of TMPDIR; gpu.shared=true does without"):
        folder.mkdir(mode=0o700, exist_ok=True)
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        likes = [n for n, card in enumerate(cards) if card.name == cards[0].name]  # rows of a table are of one kind
        taken = likes if gpu.index is None else [gpu_index(gpu)]
        gpu.index, held = hold_one({number: str(cards[number].uuid) for number in taken}, folder, log)
    return held


def hold_one(cards: Mapping[int, str], folder: Path, log: Log) -> tuple[int, IO[bytes]]:
    """The first card whose lock, a file in the folder by the card's id, nobody has, and the lock; waits for one."""
    files = {number: (folder / card).open("ab") for number, card in cards.items()}
    n_looks = 0
    while (free := next((number for number, file in files.items() if try_lock(file)), None)) is None:
        if n_looks == 0:
            which = "GPU is" if len(cards) == 1 else f"{len(cards)} GPUs are all"
            log(f"waiting: the {which} taken by other runs; gpu.shared=true shares one")
        n_looks += 1
        time.sleep(POLL_SECONDS)
    for number in files.keys() - {free}:
        files[number].close()
    return free, files[free]
