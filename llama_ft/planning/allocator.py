"""A model of the memory that PyTorch's CUDA allocator reserves for a sequence of allocations.

The allocator requests whole pages from the driver and keeps them, so it reserves more than is allocated at any time.
This is its behavior with expandable segments (`PYTORCH_ALLOC_CONF=expandable_segments:True`, as in `train` on CUDA),
after c10/cuda/CUDACachingAllocator.cpp. Sizes are rounded up to 512 bytes. Blocks of up to 1 MiB come from a pool with
pages of 2 MiB, larger ones from a pool with pages of 20 MiB. Each pool is one range of addresses that grows at its end.
A request gets the smallest free block that is large enough, the lowest among equals, and leaves the rest of it free.
The block at the end, which can grow, is used last, whatever its size. Neighboring free blocks are merged.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from llama_ft.measure.memory import Event

ROUNDING = 512  # bytes: each block is a multiple of it (kMinBlockSize, CUDACachingAllocator.h)
SMALL_SIZE = 2**20  # the largest request of the small pool
SMALL_PAGE, LARGE_PAGE = 2 * 2**20, 20 * 2**20


def rounded(n_bytes: int) -> int:
    """The block size for a request of `n_bytes`."""
    return -(-n_bytes // ROUNDING) * ROUNDING


class Pool:
    """A range of addresses, mapped in pages from 0 up to `reserved`."""

    def __init__(self, page: int) -> None:
        self.page, self.reserved = page, 0
        self._free: list[tuple[int, int]] = []  # (size, start), sorted
        self._starts: dict[int, int] = {}  # of free blocks, start to size
        self._ends: dict[int, int] = {}  # of free blocks, end to start

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes from a free block or from new pages; return the start."""
        index = bisect_left(self._free, (size, -1))
        if index == len(self._free):  # map as many pages at the end as needed in addition to the free block there
            missing = size - (self.reserved - self._ends.get(self.reserved, self.reserved))
            new = -(-missing // self.page) * self.page
            self.reserved += new
            self.release(self.reserved - new, new)
            index = bisect_left(self._free, (size, -1))
        if sum(self._free[index]) == self.reserved and index + 1 < len(self._free):
            index += 1  # the block at the end counts as being as large as it could become
        free, start = self._free[index]
        self._remove(start, free)
        if free > size:
            self._add(start + size, free - size)
        return start

    def release(self, start: int, size: int) -> None:
        """Free a block and merge it with its free neighbors."""
        if (before := self._ends.get(start)) is not None:
            length = self._starts[before]
            self._remove(before, length)
            start, size = before, size + length
        if (length_after := self._starts.get(start + size)) is not None:
            self._remove(start + size, length_after)
            size += length_after
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self._free, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _remove(self, start: int, size: int) -> None:
        del self._free[bisect_left(self._free, (size, start))]
        del self._starts[start], self._ends[start + size]


def reserved_bytes(events: Sequence[Event], workspace: int = 0) -> int:
    """The bytes reserved at the end of a log of storages, with cuBLAS workspaces allocated first.

    They never shrink, like those of the real allocator until memory runs out.
    """
    small, large = Pool(SMALL_PAGE), Pool(LARGE_PAGE)
    if workspace:
        large.allocate(rounded(workspace))
    starts: dict[int, int] = {}  # of the blocks of live storages
    for storage, sign, _ in events:
        size = rounded(storage.nbytes)
        pool = small if size <= SMALL_SIZE else large
        if sign > 0:
            starts[id(storage)] = pool.allocate(size)
        else:
            pool.release(starts.pop(id(storage)), size)
    return small.reserved + large.reserved
