"""A model of PyTorch's CUDA allocator without expandable segments, as used by others' published runs.

After c10/cuda/CUDACachingAllocator.cpp: sizes are rounded up to 512 bytes. Blocks of up to 1 MiB come from segments of
2 MiB, those below 10 MiB from segments of 20 MiB, and larger ones each have their own segment, a multiple of 2 MiB. A
request gets the smallest free block that is large enough. The rest becomes a free block: always in the small pool, in
the large one if it is more than 1 MiB.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from llama_ft.measure.memory import Event
from llama_ft.planning.allocator import ROUNDING, SMALL_SIZE, rounded
from llama_ft.system import MIB

SMALL_SEGMENT, LARGE_SEGMENT, LARGE_REQUEST = 2 * MIB, 20 * MIB, 10 * MIB


class Segments:
    """The segments of small or of large requests, and their free blocks."""

    def __init__(self, is_small: bool) -> None:
        self._is_small, self._least_rest = is_small, ROUNDING if is_small else SMALL_SIZE + 1
        self._free: list[tuple[int, int]] = []  # (size, start), sorted
        self._starts: dict[int, int] = {}  # of free blocks, start to size
        self._ends: dict[int, int] = {}  # of free blocks, end to start
        self._next_address, self.reserved = 0, 0

    def allocate(self, size: int) -> tuple[int, int]:
        """Allocate at least `size` bytes; return the block's start and size."""
        if (index := bisect_left(self._free, (size, -1))) == len(self._free):
            large = LARGE_SEGMENT if size < LARGE_REQUEST else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
            segment = SMALL_SEGMENT if self._is_small else large
            self._add(self._next_address, segment)
            self._next_address += segment + 1  # not adjacent to the next one
            self.reserved += segment
            index = bisect_left(self._free, (size, -1))
        whole, start = self._free[index]
        self._remove(start)
        if whole - size < self._least_rest:
            return start, whole
        self._add(start + size, whole - size)
        return start, size

    def release(self, start: int, size: int) -> None:
        """Free a block and merge it with its free neighbors."""
        if (before := self._ends.get(start)) is not None:
            start, size = before, self._remove(before) + size
        if start + size in self._starts:
            size += self._remove(start + size)
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self._free, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _remove(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._free[bisect_left(self._free, (size, start))], self._ends[start + size]
        return size


def native_reserved_bytes(events: Sequence[Event], workspace: int = 0) -> int:
    """The bytes reserved at the end of a log of storages, with cuBLAS workspaces allocated first."""
    small, large = Segments(True), Segments(False)
    if workspace:
        large.allocate(rounded(workspace))
    blocks: dict[int, tuple[int, int]] = {}  # of live storages
    for storage, sign, _ in events:
        size = rounded(storage.nbytes)
        segments = small if size <= SMALL_SIZE else large
        if sign > 0:
            blocks[id(storage)] = segments.allocate(size)
        else:
            segments.release(*blocks.pop(id(storage)))
    return small.reserved + large.reserved
