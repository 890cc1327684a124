"""Generating greedily with the KV cache and without it, side by side: seconds of each token, tensors alive at most."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from llama_ft.decoding.state import GenerationState
from llama_ft.measure.memory import MemoryTracker
from llama_ft.model.transformer import Transformer
from llama_ft.system import MIB

CHUNK = 16  # tokens that one generation makes before it is the other's turn
FILLER = 5  # a token id where any will do

Prompts = list[list[int]]  # token ids, of equal lengths


@dataclass
class Generation:
    """A generation as far as it has come."""

    context: GenerationState
    seconds: list[float] = field(default_factory=list)  # of each new token; the first one's includes the prompt

    def advance(self, n_tokens: int) -> None:
        """Add the most probable token, so many times; EOS ends nothing."""
        for _ in range(n_tokens):
            began = time.perf_counter()
            chosen = self.context.next_logits().argmax(-1)
            self.context.append(chosen)
            chosen.tolist()  # waits for the device, as whoever reads the text does
            self.seconds.append(time.perf_counter() - began)

    def tokens(self) -> list[list[int]]:
        """What was added to each prompt."""
        return self.context.tokens[:, self.context.prompt_length :].tolist()


def make_context(model: Transformer, prompts: Prompts, n_new: int, kv_cache: bool) -> GenerationState:
    """Prompts to go on from, in the dtype of the weights."""
    return GenerationState(model, prompts, n_new, kv_cache, model.output.weight.dtype)


@torch.inference_mode()
def generate_side_by_side(
    model: Transformer, prompts: Prompts, n_new: int, cache_first: bool = True
) -> dict[bool, Generation]:
    """Generate n_new tokens with the cache (True) and without it (False).

    The two take turns, a few tokens each, so that whatever else the machine does disturbs both alike. Whose turn is
    the first, and with it the first token's, the caller chooses.
    """
    both = {}
    for kv_cache in (True, False):
        Generation(make_context(model, prompts, 2, kv_cache)).advance(2)  # what is slow only once: libraries start
        both[kv_cache] = Generation(make_context(model, prompts, n_new, kv_cache))
    turns = [both[cache_first], both[not cache_first]]
    for start in range(0, n_new, CHUNK):
        for generation in turns:
            generation.advance(min(CHUNK, n_new - start))
        turns.reverse()  # neither always comes first
    return both


def medians(rounds: list[list[float]]) -> list[float]:
    """Each token's median over rounds of the same generation."""
    return [median(seconds) for seconds in zip(*rounds, strict=True)]


# Memory, in passes of their own that are not timed


@torch.inference_mode()
def peak_memory(model: Transformer, prompts: Prompts, n_new: int, kv_cache: bool) -> int:
    """Bytes of all tensors alive at most, weights included, when n_new tokens are generated.

    On the CPU as the tracker counts them, on CUDA the allocator's maximum. What a step needs is given by its lengths
    and grows with them: the first one, which computes the prompt, and the last one are run.
    """
    first = _most_alive(model, lambda: make_context(model, prompts, n_new, kv_cache).next_logits())
    context = make_context(model, prompts, n_new, kv_cache)
    for _ in range(n_new - 1):
        context.append(torch.full_like(context.n_prompt, FILLER))
    held: list[Tensor] = []
    if context.cache is not None:
        held = [buffer for layer in context.cache.layers for buffer in (layer.keys, layer.values)]
        one = torch.zeros(1, dtype=torch.int64, device=context.tokens.device)
        model(context.tokens[:, :-1], kv_cache=context.cache, logits_at=one)  # as the steps before would have left it
    return max(first, _most_alive(model, context.next_logits, held))


@torch.inference_mode()
def cache_bytes(model: Transformer, prompts: Prompts, n_new: int) -> int:
    """Bytes of tensors that a generation of n_new tokens begins with, more than one without a cache."""
    with_cache = _most_alive(model, lambda: make_context(model, prompts, n_new, True))
    return with_cache - _most_alive(model, lambda: make_context(model, prompts, n_new, False))


def _most_alive(model: Transformer, act: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """Bytes of tensors alive at most while `act` runs: weights, those held, those that it makes."""
    device = model.output.weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        act()
        return torch.cuda.max_memory_allocated(device)
    with MemoryTracker(model, torch.optim.SGD(model.parameters(), lr=0.0), held) as tracker:
        act()
    return round(tracker.result().peak_mib * MIB)
