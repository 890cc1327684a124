"""The measurements of `experiments.kv_cache`, on the tiny model with real text as prompts."""

from itertools import accumulate
from typing import Any

from experiments.generation import Prompts, cache_bytes, generate_side_by_side, medians, peak_memory
from experiments.kv_cache_report import Line, closed_form
from llama_ft.model.transformer import Transformer

APART = 500  # tokens of the text between the beginnings of two prompts
STRIDE = 8  # new tokens between two points of a curve


def measure_line(
    model: Transformer, text: list[int], line: Line, outputs: tuple[int, ...], repeats: int
) -> dict[str, Any]:
    """Generate `repeats` times: the cells and curves of the line, and how many of its texts differ."""
    prompts = [text[row * APART : row * APART + line.prompt] for row in range(line.batch)]
    assert all(len(prompt) == line.prompt for prompt in prompts), "the text is too short for these prompts"
    rounds = [generate_side_by_side(model, prompts, line.new, round_ % 2 == 0) for round_ in range(repeats)]
    pairs = [pair for both in rounds for pair in zip(both[True].tokens(), both[False].tokens(), strict=True)]
    cells, curves, marks = [], [], range(STRIDE, line.new + 1, STRIDE)
    for kv_cache in (True, False):
        totals = list(accumulate(medians([both[kv_cache].seconds for both in rounds])))
        own = {"batch": line.batch, "prompt": line.prompt, "kv_cache": kv_cache}
        cells += [own | _cell(model, prompts, new, kv_cache, totals) for new in outputs if new <= line.new]
        curves.append(own | {"new": list(marks), "total_s": [totals[new - 1] for new in marks]})
    different = sum(with_cache != without for with_cache, without in pairs)
    kinds = min(len(set(with_cache)) for with_cache, _ in pairs)
    return {
        "cells": cells,
        "curves": curves,
        "texts_compared": len(pairs),
        "texts_different": different,
        "fewest_kinds_of_tokens": kinds,
    }


def _cell(model: Transformer, prompts: Prompts, new: int, kv_cache: bool, totals: list[float]) -> dict[str, Any]:
    """The first `new` tokens of a generation whose seconds up to each token are `totals`."""
    batch, tokens, bytes_each = len(prompts), len(prompts[0]) + new, model.output.weight.element_size()
    return {
        "new": new,
        "first_token_s": totals[0],
        "decode_tokens_per_s": batch * (new - 1) / (totals[new - 1] - totals[0]),
        "total_s": totals[new - 1],
        "peak_memory_bytes": peak_memory(model, prompts, new, kv_cache),
        "cache_bytes": cache_bytes(model, prompts, new) if kv_cache else 0,
        "closed_form_bytes": closed_form(model.config, batch, tokens, bytes_each) if kv_cache else 0,
    }
