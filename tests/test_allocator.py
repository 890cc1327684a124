"""The model of CUDA's allocator, against cases by hand."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ft.measure.memory import Allocation
from llama_ft.planning.allocator import LARGE_PAGE, SMALL_PAGE, Pool, reserved_bytes, rounded


def test_the_allocator_takes_whole_pages_and_reuses_what_is_free() -> None:
    sizes = (1, 3 * 2**20, 17 * 2**20, 2 * 2**20, 2 * 2**20)
    small, big, rest, first, second = (Allocation(size, torch.uint8, "activation") for size in sizes)
    # The rest of the page; then into the hole, of which 1 MiB is left: another page. Nothing is given back.
    order = [(small, 1), (big, 1), (rest, 1), (big, -1), (first, 1), (second, 1), (small, -1)]
    events = [(storage, sign, "forward") for storage, sign in order]
    both = SMALL_PAGE + LARGE_PAGE
    reserved = [reserved_bytes(events[:n]) for n in range(1, 8)]
    assert reserved == [SMALL_PAGE, both, both, both, both, both + LARGE_PAGE, both + LARGE_PAGE]
    assert reserved_bytes(events, workspace=LARGE_PAGE) == reserved[-1] + LARGE_PAGE


def test_expandable_segments_grow_by_what_is_missing() -> None:
    pool = Pool(LARGE_PAGE)
    assert [pool.allocate(15 * 2**20), pool.allocate(25 * 2**20)] == [0, 15 * 2**20]
    assert pool.reserved == 2 * LARGE_PAGE  # 5 MiB are free at the end: one page is enough


def test_the_end_that_can_grow_is_taken_last() -> None:
    pool = Pool(LARGE_PAGE)
    hole = pool.allocate(12 * 2**20)
    pool.allocate(2 * 2**20)  # 6 MiB are left at the end
    pool.release(hole, 12 * 2**20)
    assert pool.allocate(4 * 2**20) == 0  # the end would have been the better fit
    assert pool.allocate(5 * 2**20) == 4 * 2**20
    assert pool.reserved == LARGE_PAGE
    assert pool.allocate(5 * 2**20) == 14 * 2**20  # nothing else is left


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50 * 2**20)), max_size=60))
def test_blocks_never_overlap_and_reserved_covers_them(requests: list[tuple[bool, int]]) -> None:
    pool = Pool(LARGE_PAGE)
    live: list[tuple[int, int]] = []
    for release, n_bytes in requests:
        if release and live:
            pool.release(*live.pop(n_bytes % len(live)))
        else:
            size = rounded(n_bytes)
            assert n_bytes <= size < n_bytes + 512
            live.append((pool.allocate(size), size))
    for (start, size), (begin, length) in itertools.combinations(live, 2):
        assert start + size <= begin or begin + length <= start
    assert pool.reserved >= sum(size for _, size in live)
    assert pool.reserved % LARGE_PAGE == 0
