"""What the measurements of `experiments.kv_cache` say: a table of the cells, and the claims.

The numbers are those of kv_cache.json. A cell is {batch, prompt, new, kv_cache, first_token_s, decode_tokens_per_s,
total_s, peak_memory_bytes, cache_bytes, closed_form_bytes}, a curve {batch, prompt, kv_cache, new: [...],
total_s: [...]}; batch in texts, prompt and new in tokens.
"""

import math
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any

from experiments.study import Claim, Numbers, table
from llama_ft.config import ModelConfig
from llama_ft.system import MIB

MIN_SPEED_UP = 5.0
MIN_EXPONENT_GAP = 0.3  # of at most 1, for a text that is long against its prompt
MAX_BYTES_APART = 0.02

Cell = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A generation. Shorter outputs to the same prompts are its beginnings, so that it gives several cells."""

    batch: int  # texts
    prompt: int  # tokens of each
    new: int  # tokens of each


def closed_form(model: ModelConfig, batch: int, tokens: int, bytes_each: int) -> int:
    """Bytes of the keys and the values of so many tokens, in all layers."""
    return 2 * model.n_layers * model.n_kv_heads * model.head_dim * tokens * bytes_each * batch


def exponent(new: list[int], seconds: list[float]) -> float:
    """The slope of a straight line through the points on logarithmic axes, from an eighth of the longest on.

    Shorter ones are left out: a hiccup of the machine weighs much in them.
    """
    points = [(math.log(n), math.log(s)) for n, s in zip(new, seconds, strict=True) if 8 * n >= max(new)]
    return linear_regression(*zip(*points, strict=True)).slope


def claims_of(numbers: Numbers) -> list[Claim]:
    """What the numbers say of each claim."""
    return [
        _speed_claim(numbers["speed"], numbers["cells"]),
        _growth_claim(numbers["growth"], numbers["curves"], numbers["exponent_gap"]),
        _bytes_claim([cell for cell in numbers["cells"] if cell["kv_cache"]]),
        _text_claim(numbers),
    ]


def _both(items: list[Cell], **wanted: int) -> tuple[Cell, Cell]:
    """With the cache and without it: the cells, or curves, that have what is wanted."""
    found = [item for item in items if wanted.items() <= {key: item[key] for key in wanted}.items()]
    with_cache, without = sorted(found, key=lambda item: not item["kv_cache"])
    return with_cache, without


def _speed_claim(line: dict[str, int], cells: list[Cell]) -> Claim:
    with_cache, without = (cell["total_s"] for cell in _both(cells, **line))
    what = f"{line['new']} new tokens after a prompt of {line['prompt']} come at least {MIN_SPEED_UP:g} times as fast"
    numbers = {"times as fast": without / with_cache, "seconds with": with_cache, "seconds without": without}
    return Claim(f"{what} with the cache", without >= MIN_SPEED_UP * with_cache, numbers)


def _growth_claim(line: dict[str, int], curves: list[Cell], gap: float) -> Claim:
    both = _both(curves, batch=line["batch"], prompt=line["prompt"])
    with_cache, without = (exponent(curve["new"], curve["total_s"]) for curve in both)
    what = "without the cache time grows with a higher power of the output's length"
    numbers = {"exponent with": with_cache, "exponent without": without}
    return Claim(f"{what}, by {gap:g} or more", without - with_cache >= gap, numbers)


def _bytes_claim(cells: list[Cell]) -> Claim:
    worst = max(abs(cell["cache_bytes"] / cell["closed_form_bytes"] - 1) for cell in cells)
    what = "the cache has the bytes of 2 x layers x kv_heads x head_dim x tokens x bytes x batch"
    numbers = {"cells": len(cells), "percent apart at most": 100 * worst}
    return Claim(f"{what}, within {100 * MAX_BYTES_APART:g} percent", worst <= MAX_BYTES_APART, numbers)


def _text_claim(numbers: dict[str, Any]) -> Claim:
    compared, different = numbers["texts_compared"], numbers["texts_different"]
    found = {"texts": compared, "different": different, "kinds of tokens at least": numbers["fewest_kinds_of_tokens"]}
    return Claim("the text is the same with the cache and without it", compared > 0 and different == 0, found)


def table_of(numbers: Numbers) -> str:
    """The cells in Markdown, those with the cache and without it in one row."""
    cells = numbers["cells"]
    titles = ("batch", "prompt", "new", "first token, ms", "then tokens/s", "total, s", "times as fast", "peak, MiB")
    rows = []
    for batch, prompt, new in dict.fromkeys((cell["batch"], cell["prompt"], cell["new"]) for cell in cells):
        with_cache, without = both = _both(cells, batch=batch, prompt=prompt, new=new)
        rows.append(
            [
                *(batch, prompt, new),
                " / ".join(f"{1000 * cell['first_token_s']:,.0f}" for cell in both),
                " / ".join(f"{cell['decode_tokens_per_s']:,.0f}" for cell in both),
                " / ".join(f"{cell['total_s']:,.2f}" for cell in both),
                f"{without['total_s'] / with_cache['total_s']:.1f}",
                " / ".join(f"{cell['peak_memory_bytes'] / MIB:,.1f}" for cell in both),
                *(f"{with_cache[key] / MIB:,.2f}" for key in ("cache_bytes", "closed_form_bytes")),
            ]
        )
    note = "With the cache / without it. Peak: tensors alive at most, weights included."
    return f"{table((*titles, 'cache, MiB', 'formula, MiB'), rows)}\n{note}\n"
