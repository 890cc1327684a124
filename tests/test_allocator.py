"""The model of CUDA's allocator, against cases by hand."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ft.planning.allocator import LARGE_PAGE, SMALL_PAGE, Allocator, rounded


def test_the_allocator_takes_whole_pages_and_reuses_what_is_free() -> None:
    allocator = Allocator()
    first = allocator.allocate(1)
    assert allocator.reserved == SMALL_PAGE
    big = allocator.allocate(3 * 2**20)
    assert allocator.reserved == SMALL_PAGE + LARGE_PAGE
    allocator.allocate(17 * 2**20)  # the rest of the page
    assert allocator.reserved == SMALL_PAGE + LARGE_PAGE
    allocator.release(big)
    allocator.allocate(2 * 2**20)  # into the hole
    assert allocator.reserved == SMALL_PAGE + LARGE_PAGE
    allocator.allocate(2 * 2**20)  # 1 MiB of the hole is left: another page
    assert allocator.reserved == SMALL_PAGE + 2 * LARGE_PAGE
    allocator.release(first)
    assert allocator.reserved == SMALL_PAGE + 2 * LARGE_PAGE  # nothing is given back


def test_expandable_segments_grow_by_what_is_missing() -> None:
    allocator = Allocator()
    held = allocator.allocate(15 * 2**20)
    allocator.allocate(25 * 2**20)  # 5 MiB are free at the end: one page is enough
    assert allocator.reserved == 2 * LARGE_PAGE
    allocator.release(held)


def test_the_end_that_can_grow_is_taken_last() -> None:
    allocator = Allocator()
    hole = allocator.allocate(12 * 2**20)
    held = allocator.allocate(2 * 2**20)  # 6 MiB are left at the end
    allocator.release(hole)
    _, start, _ = allocator.allocate(4 * 2**20)
    assert start == 0  # the end would have been the better fit
    _, start, _ = allocator.allocate(5 * 2**20)
    assert start == 4 * 2**20
    assert allocator.reserved == LARGE_PAGE
    _, start, _ = allocator.allocate(5 * 2**20)
    assert start == 14 * 2**20  # nothing else is left
    allocator.release(held)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50 * 2**20)), max_size=60))
def test_blocks_never_overlap_and_reserved_covers_them(requests: list[tuple[bool, int]]) -> None:
    allocator = Allocator()
    live: list[tuple[object, int, int]] = []
    for release, size in requests:
        if release and live:
            allocator.release(live.pop(size % len(live)))  # type: ignore[arg-type]
        else:
            live.append(allocator.allocate(size))
            assert live[-1][2] == rounded(size) >= size
    for (pool, start, size), (other, begin, length) in itertools.combinations(live, 2):
        assert pool is not other or start + size <= begin or begin + length <= start
    assert allocator.reserved >= sum(size for _, _, size in live)
    assert allocator.reserved % SMALL_PAGE == 0
