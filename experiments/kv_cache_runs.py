"""The measurements of `experiments.kv_cache`: greedy generation with and without the KV cache, in turns.

A cell is {batch, prompt, new, kv_cache, first_token_s, decode_tokens_per_s, total_s, peak_memory_bytes, cache_bytes,
closed_form_bytes}, a curve {batch, prompt, kv_cache, new: [...], total_s: [...]}; `batch` counts texts, `prompt` and
`new` tokens.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

import torch
from torch import Tensor

from experiments.study import Numbers
from llama_ft.config import ModelConfig
from llama_ft.decoding.state import GenerationState
from llama_ft.measure.memory import MemoryTracker
from llama_ft.model.transformer import Transformer
from llama_ft.system import MIB

DISTANCE = 500  # tokens of the text between the beginnings of two prompts
STRIDE = 8  # new tokens between two points of a curve
CHUNK = 16  # tokens that one generation makes before the other's turn
FILLER = 5  # an arbitrary token id

Prompts = list[list[int]]  # token ids, of equal lengths


@dataclass(frozen=True)
class Line:
    """A generation. Shorter outputs to the same prompts are its beginnings, so one line gives several cells."""

    batch: int  # texts
    prompt: int  # tokens of each
    new: int  # tokens of each


def measure_line(model: Transformer, text: list[int], line: Line, outputs: tuple[int, ...], repeats: int) -> Numbers:
    """Generate `repeats` times; return the line's cells and curves, and the number of its texts that differ."""
    prompts = [text[row * DISTANCE : row * DISTANCE + line.prompt] for row in range(line.batch)]
    rounds = [generate_side_by_side(model, prompts, line.new, round_ % 2 == 0) for round_ in range(repeats)]
    pairs = [pair for both in rounds for pair in zip(both[True].tokens(), both[False].tokens(), strict=True)]
    cells, curves, marks = [], [], range(STRIDE, line.new + 1, STRIDE)
    for kv_cache in (True, False):
        totals = list(accumulate(medians([both[kv_cache].seconds for both in rounds])))
        own = {"batch": line.batch, "prompt": line.prompt, "kv_cache": kv_cache}
        cells += [own | _cell(model, prompts, new, kv_cache, totals) for new in outputs if new <= line.new]
        curves.append(own | {"new": list(marks), "total_s": [totals[new - 1] for new in marks]})
    return {
        "cells": cells,
        "curves": curves,
        "texts_compared": len(pairs),
        "texts_different": sum(with_cache != without for with_cache, without in pairs),
        "fewest_kinds_of_tokens": min(len(set(with_cache)) for with_cache, _ in pairs),
    }


def _cell(model: Transformer, prompts: Prompts, new: int, kv_cache: bool, totals: list[float]) -> Numbers:
    """The cell for the first `new` tokens of a generation, where `totals` are the seconds up to each token."""
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


def closed_form(model: ModelConfig, batch: int, tokens: int, bytes_each: int) -> int:
    """The bytes of the keys and values of `tokens` tokens in all layers."""
    return 2 * model.n_layers * model.n_kv_heads * model.head_dim * tokens * bytes_each * batch


@dataclass
class Generation:
    """A generation in progress."""

    state: GenerationState
    seconds: list[float] = field(default_factory=list)  # of each new token; the first one's includes the prompt

    def advance(self, n_tokens: int) -> None:
        """Append the most probable token `n_tokens` times, without stopping at EOS."""
        for _ in range(n_tokens):
            began = time.perf_counter()
            chosen = self.state.next_logits().argmax(-1)
            self.state.append(chosen)
            chosen.tolist()  # waits for the device, as reading the text would
            self.seconds.append(time.perf_counter() - began)

    def tokens(self) -> list[list[int]]:
        """The tokens appended to each prompt."""
        return self.state.tokens[:, self.state.prompt_length :].tolist()


def initial_state(model: Transformer, prompts: Prompts, n_new: int, kv_cache: bool) -> GenerationState:
    """The prompts before generation, with a cache in the weights' dtype."""
    return GenerationState(model, prompts, n_new, kv_cache)


@torch.inference_mode()
def generate_side_by_side(
    model: Transformer, prompts: Prompts, n_new: int, cache_first: bool = True
) -> dict[bool, Generation]:
    """Generate n_new tokens with (True) and without (False) the cache.

    The two take turns, a few tokens each, so that other load on the machine disturbs both equally. The caller chooses
    which one generates the first tokens first.
    """
    both = {}
    for kv_cache in (True, False):
        Generation(initial_state(model, prompts, 2, kv_cache)).advance(2)  # warm-up: libraries start
        both[kv_cache] = Generation(initial_state(model, prompts, n_new, kv_cache))
    turns = [both[cache_first], both[not cache_first]]
    for done in range(0, n_new, CHUNK):
        for generation in turns:
            generation.advance(min(CHUNK, n_new - done))
        turns.reverse()  # neither always comes first
    return both


def medians(rounds: list[list[float]]) -> list[float]:
    """Each token's median seconds over rounds of the same generation."""
    return [median(seconds) for seconds in zip(*rounds, strict=True)]


@torch.inference_mode()
def peak_memory(model: Transformer, prompts: Prompts, n_new: int, kv_cache: bool) -> int:
    """The peak bytes of all tensors, including weights, when n_new tokens are generated; not timed.

    On the CPU the tracker counts them, on CUDA it is the allocator's maximum. A step's needs depend only on its lengths
    and grow with them, so only the first step, which computes the prompt, and the last one are run.
    """
    first = _peak_bytes(model, lambda: initial_state(model, prompts, n_new, kv_cache).next_logits())
    state = initial_state(model, prompts, n_new, kv_cache)
    for _ in range(n_new - 1):
        state.append(torch.full_like(state.n_prompt, FILLER))
    held: list[Tensor] = []
    if state.cache is not None:
        held = [buffer for layer in state.cache.layers for buffer in (layer.keys, layer.values)]
        one = torch.zeros(1, dtype=torch.int64, device=state.tokens.device)
        model(state.tokens[:, :-1], kv_cache=state.cache, logits_at=one)  # fill it as earlier steps would have
    return max(first, _peak_bytes(model, state.next_logits, held))


@torch.inference_mode()
def cache_bytes(model: Transformer, prompts: Prompts, n_new: int) -> int:
    """The additional bytes that a generation of n_new tokens allocates at its start with a cache."""
    with_cache = _peak_bytes(model, lambda: initial_state(model, prompts, n_new, True))
    return with_cache - _peak_bytes(model, lambda: initial_state(model, prompts, n_new, False))


def _peak_bytes(model: Transformer, act: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """The peak bytes of tensors while `act` runs: weights, tensors held and tensors that it creates."""
    device = model.output.weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        act()
        return torch.cuda.max_memory_allocated(device)
    with MemoryTracker(model, torch.optim.SGD(model.parameters(), lr=0.0), held) as tracker:
        act()
    return round(tracker.result().peak_mib * MIB)
