"""What one more layer adds to a run, from the logs of a shallow run and of a deeper one.

Each part of a step (the forward pass, the backward pass, ...) of the deeper run is that of the shallow one with more
put in at a few places. What one layer adds there, any number of layers adds as often.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

DEPTHS = (4, 5)  # layers of the two runs: enough for a first, a last and some in between
Token = tuple[int, ...]  # a storage allocated, or all that are freed before the next one is allocated
Tokens = list[Token]


@dataclass(frozen=True)
class Section:
    """A part of a run: the numbers of the storages that it allocates and frees."""

    phase: str
    once: tuple[int, ...]
    layer: tuple[int, ...]  # then, for each layer beyond `DEPTHS[0]`


class DoesNotRepeat(ValueError):
    """A part of a run is not that of a shallower run with a layer put in."""


def split(phase: str, short: Tokens, long: Tokens) -> Iterator[Section]:
    """The sections of a phase, from its tokens in the shallow run and in the deeper one.

    Raises:
        DoesNotRepeat: if the shallow run is not the deeper one without some tokens.
    """
    fixed: list[int] = []
    position = 0  # in the deeper run
    for token, n_inserted in zip([*short, ()], inserted(phase, short, long), strict=True):
        if n_inserted:
            block = long[position : position + n_inserted]
            yield Section(phase, tuple(fixed), tuple(number for token in block for number in token))
            fixed, position = [], position + n_inserted
        fixed += token
        if more := Counter(long[position] if token else ()) - Counter(token):  # freed at once for all layers
            yield Section(phase, tuple(fixed), tuple(more.elements()))
            fixed = []
        position += 1
    if fixed:
        yield Section(phase, tuple(fixed), ())


def inserted(phase: str, short: Tokens, long: Tokens) -> list[int]:
    """How many tokens the deeper run has before each of the shallow one's, and after the last: in the fewest blocks.

    Of equally few blocks, those are found that contain the most. It is an edit distance that allows only insertions; a
    backward pass has some 500 tokens, and 100 more with a layer more.
    """
    n, error = len(long) - len(short), DoesNotRepeat(f"the {phase} does not repeat from layer to layer")
    if n < 0:
        raise error
    impossible, a_block = 10**12, 10**6
    matched = [[impossible] * (n + 1) for _ in range(len(short) + 1)]  # the cost of the first i tokens, with k inserted
    inside = [[impossible] * (n + 1) for _ in range(len(short) + 1)]  # the same, if the last one is an inserted one
    matched[0][0] = 0
    for i in range(len(short) + 1):
        for k in range(n + 1):
            if k:
                inside[i][k] = min(inside[i][k - 1], matched[i][k - 1] + a_block)
            best = min(matched[i][k], inside[i][k])
            if i < len(short) and best < impossible and are_alike(short[i], long[i + k]):
                matched[i + 1][k] = best + len(long[i + k])
    i, k, counts = len(short), n, [0] * (len(short) + 1)
    if min(matched[i][k], inside[i][k]) >= impossible:
        raise error
    is_inside = inside[i][k] < matched[i][k]
    while i or k:
        if is_inside:
            counts[i] += 1
            k -= 1
            is_inside = inside[i][k] <= matched[i][k] + a_block
        else:
            i -= 1
            is_inside = inside[i][k] < matched[i][k]
    return counts


def are_alike(short: Token, long: Token) -> bool:
    """Return True if a token can be that of a deeper run, which may free more storages of the same kinds at once."""
    return short == long or (short[0] < 0 and set(short) == set(long) and not Counter(short) - Counter(long))
