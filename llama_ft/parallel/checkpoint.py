"""Sharded tensors on disk: each process writes and reads its own rows.

`torch.distributed.checkpoint` stores them in safetensors files, which any number of processes can read.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from llama_ft.config import UserError
from llama_ft.model.sharded import is_split, like, own
from llama_ft.parallel.ranks import Ranks

SHARDS = "shard-*.safetensors"


def write_split(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors into a folder, all processes at once; a UserError if they cannot be written."""
    with _explained(f"{folder} cannot be written"):
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save({name: _shared(tensor) for name, tensor in tensors.items()}, storage_writer=writer)


def read_split(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Fill tensors, whole or split over any number of processes, from a folder; a UserError if it is damaged."""
    with _explained(f"{folder} cannot be read"):
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = HuggingFaceStorageReader(str(folder))
        load({name: _shared(each) for name, each in tensors.items()}, storage_reader=reader, no_dist=ranks.is_alone)


def _shared(tensor: Tensor) -> Tensor:
    """The same memory, detached from autograd and modules."""
    return like(tensor, own(tensor.detach())) if is_split(tensor) else tensor.detach()


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no_dist.*|.*TypedStorage.*|.*deprecated.*")
        try:
            yield
        except Exception as error:  # may wrap that of another process
            root: BaseException = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
            raise UserError(f"{problem}: {root}") from error
