"""Cached and uncached generation: the same logits at every position, the same text, the bytes that the formula says."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ft.config import ModelConfig
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.context import Context
from llama_ft.model.kv_cache import KVCache
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import initialize

SMALL = ModelConfig("small", dim=64, n_layers=3, n_heads=8, n_kv_heads=8, ffn_dim=96, vocab_size=300, context=256)
SIZES = {"MHA": SMALL, "GQA": replace(SMALL, n_kv_heads=2), "MQA": replace(SMALL, n_kv_heads=1)}


def make_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    initialize(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)  # far from uniform, so that mistakes show
    return model.eval()


def random_tokens(batch: int, length: int, seed: int = 0, vocabulary: int = 300) -> Tensor:
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def cache_for(config: ModelConfig, batch: int, tokens: int) -> KVCache:
    return KVCache(config, batch, tokens, torch.float32)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_logits_equal_at_every_position_however_the_tokens_come(name: str) -> None:
    model, tokens = make_model(SIZES[name]), random_tokens(2, 40)
    whole = model(tokens)
    for pieces in ([40], [1] * 40, [17, 1, 1, 21], [39, 1]):
        cache, found = cache_for(SIZES[name], 2, 40), []
        for piece in pieces:
            start = cache.length
            found.append(model(tokens[:, start : start + piece], kv_cache=cache))
        assert difference(torch.cat(found, dim=1), whole) <= 1e-5


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), name=st.sampled_from(sorted(SIZES)))
@settings(max_examples=15, deadline=None, derandomize=True)
@torch.no_grad()
def test_a_padded_batch_is_each_prompt_by_itself(lengths: list[int], name: str) -> None:
    model = make_model(SIZES[name])
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in lengths]
    for kv_cache in (True, False):
        together = Context(model, prompts, 6, kv_cache, torch.float32)
        alone = [Context(model, [prompt], 6, False, torch.float32) for prompt in prompts]
        for _ in range(6):
            logits = together.next_logits()
            for row, context in enumerate(alone):
                assert difference(logits[row : row + 1], context.next_logits()) <= 1e-5
            chosen = logits.argmax(-1)
            together.append(chosen)
            for row, context in enumerate(alone):
                context.append(chosen[row : row + 1])


@torch.no_grad()
def test_reordered_sequences_go_on_from_where_their_sources_were() -> None:
    model = make_model(SIZES["GQA"])
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 9, 5)]
    rows = torch.tensor([2, 2, 0])
    cached = Context(model, prompts, 4, True, torch.float32)
    cached.next_logits()
    cached.append(torch.tensor([7, 8, 9]))
    cached.reorder(rows)
    anew = Context(model, [[*prompts[2], 9], [*prompts[2], 9], [*prompts[0], 7]], 4, False, torch.float32)
    assert difference(cached.next_logits(), anew.next_logits()) <= 1e-5


def test_seen_leaves_padding_out() -> None:
    context = Context(make_model(SMALL), [[5, 6, 7], [9]], 2, False, torch.float32)
    assert [row.nonzero().flatten().tolist() for row in context.seen()] == [[5, 6, 7], [9]]
    context.append(torch.tensor([0, 9]))
    assert [row.nonzero().flatten().tolist() for row in context.seen()] == [[0, 5, 6, 7], [9]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_has_the_bytes_of_the_formula_and_room_for_no_more(dtype: torch.dtype) -> None:
    config = SIZES["GQA"]
    cache = KVCache(config, 3, 20, dtype)
    assert cache.nbytes == 2 * config.n_layers * 3 * config.n_kv_heads * config.head_dim * 20 * dtype.itemsize
    model = make_model(config).to(dtype)
    model(random_tokens(3, 20), kv_cache=cache)
    with pytest.raises(ValueError, match="room for 20 tokens, not for 21"):
        model(random_tokens(3, 1), kv_cache=cache)


@torch.no_grad()
def test_a_cache_that_was_reset_remembers_nothing() -> None:
    model, cache = make_model(SMALL), cache_for(SMALL, 1, 30)
    model(random_tokens(1, 30, seed=1), kv_cache=cache)
    cache.reset()
    tokens = random_tokens(1, 12, seed=2)
    assert difference(model(tokens, kv_cache=cache), model(tokens)) <= 1e-5


def test_tokens_beyond_the_context_are_refused_with_a_cache_too() -> None:
    cache = cache_for(SMALL, 1, 300)
    model = make_model(SMALL)
    model(random_tokens(1, 256), kv_cache=cache)
    with pytest.raises(ValueError, match="257 tokens exceed the model's context of 256"):
        model(random_tokens(1, 1), kv_cache=cache)


@torch.no_grad()
def test_greedy_text_is_the_same_for_20_prompts_of_128_tokens(tiny_config) -> None:
    """Uncached greedy decoding takes, after each prefix, what one forward over the whole says at its last position."""
    model = make_model(tiny_config.model)
    tokenizer = Tokenizer(tiny_config.tokenizer_file)
    words = "Tell me why the sea is blue and what the old king said to his young friends in the garden".split()
    prompts = [tokenizer.encode(" ".join(words[: n + 1]), bos=True) for n in range(20)]
    context = Context(model, prompts, 128, True, torch.float32)
    for _ in range(128):
        context.append(context.next_logits().argmax(-1))
    answers = context.tokens[:, context.prompt_length :].tolist()
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
    assert len({tuple(answer) for answer in answers}) > 10


def test_training_never_makes_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "__init__", lambda *_: pytest.fail("a cache was made"))
    model = make_model(SMALL)
    model(random_tokens(2, 9)).sum().backward()
