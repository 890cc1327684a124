"""Cached and uncached generation: the same logits at every position, the same text, the bytes that the formula says."""

import ast
import functools
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CHECKOUT
from helpers.models import SIZES, make_model, random_tokens, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ft import cli
from llama_ft.config import GenerateConfig, ModelConfig
from llama_ft.data.prompt import prompt_text
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import generate
from llama_ft.decoding.state import GenerationState
from llama_ft.model.kv_cache import KVCache, LayerCache
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model

# New tokens of each of the 20 texts on LLaMA-2-7B's shapes: 128 is the full test, which takes two minutes of a core.
N_PARITY = int(os.environ.get("LLAMA_FT_PARITY_TOKENS", "3"))


def cache_for(config: ModelConfig, batch: int, tokens: int) -> KVCache:
    return KVCache(config, batch, tokens, torch.float32)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_logits_equal_at_every_position_however_the_tokens_come(name):
    model, tokens = make_model(SIZES[name]), random_tokens(2, 40)
    whole = model(tokens)
    for pieces in ([40], [1] * 40, [17, 1, 1, 21], [39, 1]):
        cache, found = cache_for(SIZES[name], 2, 40), []
        for piece in pieces:
            start = cache.length
            found.append(model(tokens[:, start : start + piece], kv_cache=cache))
        assert relative(torch.cat(found, dim=1), whole) <= 1e-5


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), name=st.sampled_from(sorted(SIZES)))
@settings(max_examples=15, deadline=None, derandomize=True)
@torch.no_grad()
def test_a_padded_batch_is_each_prompt_by_itself(lengths, name):
    model = make_model(SIZES[name])
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in lengths]
    for kv_cache in (True, False):
        together = GenerationState(model, prompts, 6, kv_cache)
        alone = [GenerationState(model, [prompt], 6, False) for prompt in prompts]
        for _ in range(6):
            logits = together.next_logits()
            for row, state in enumerate(alone):
                assert relative(logits[row : row + 1], state.next_logits()) <= 1e-5
            chosen = logits.argmax(-1)
            together.append(chosen)
            for row, state in enumerate(alone):
                state.append(chosen[row : row + 1])


@torch.no_grad()
def test_reordered_sequences_go_on_from_where_their_sources_were():
    model = make_model(SIZES["GQA"])
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 9, 5)]
    rows = torch.tensor([2, 2, 0])
    cached = GenerationState(model, prompts, 4, True)
    cached.next_logits()
    cached.append(torch.tensor([7, 8, 9]))
    cached.reorder(rows)
    anew = GenerationState(model, [[*prompts[2], 9], [*prompts[2], 9], [*prompts[0], 7]], 4, False)
    assert relative(cached.next_logits(), anew.next_logits()) <= 1e-5


def test_seen_leaves_padding_out():
    state = GenerationState(make_model(SIZES["MHA"]), [[5, 6, 7], [9]], 2, False)
    assert [row.nonzero().flatten().tolist() for row in state.seen()] == [[5, 6, 7], [9]]
    state.append(torch.tensor([0, 9]))
    assert [row.nonzero().flatten().tolist() for row in state.seen()] == [[0, 5, 6, 7], [9]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_has_the_bytes_of_the_formula_and_room_for_no_more(dtype):
    config = SIZES["GQA"]
    cache = KVCache(config, 3, 20, dtype)
    assert cache.nbytes == 2 * config.n_layers * 3 * config.n_kv_heads * config.head_dim * 20 * dtype.itemsize
    model = make_model(config).to(dtype)
    model(random_tokens(3, 20), kv_cache=cache)
    with pytest.raises(ValueError, match="room for 20 tokens, not for 21"):
        model(random_tokens(3, 1), kv_cache=cache)


def test_tokens_beyond_the_context_are_refused_with_a_cache_too():
    cache = cache_for(SIZES["MHA"], 1, 300)
    model = make_model(SIZES["MHA"])
    model(random_tokens(1, 256), kv_cache=cache)
    with pytest.raises(ValueError, match="257 tokens exceed the model's context of 256"):
        model(random_tokens(1, 1), kv_cache=cache)


@pytest.mark.parametrize("n_kv_heads", [6, 2])
@torch.no_grad()
def test_greedy_text_is_the_same_for_20_prompts_of_128_tokens(tiny_config, n_kv_heads):
    """Uncached greedy decoding takes, after each prefix, what one forward over the whole says at its last position."""
    model = make_model(replace(tiny_config.model, n_kv_heads=n_kv_heads))
    tokenizer = Tokenizer(tiny_config.tokenizer_file)
    words = "Tell me why the sea is blue and what the old king said to his young friends in the garden".split()
    prompts = [tokenizer.encode(" ".join(words[: n + 1]), bos=True) for n in range(20)]
    state = GenerationState(model, prompts, 128, True)
    for _ in range(128):
        state.append(state.next_logits().argmax(-1))
    answers = state.tokens[:, state.prompt_length :].tolist()
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
    assert len({tuple(answer) for answer in answers}) > 10


# One layer of LLaMA-2-7B, real tokens


@pytest.fixture(scope="module")
def one_layer() -> Transformer:
    """Full-size embeddings, layer and head with random weights: 1.9 GB."""
    sizes = {}
    for name in ("llama2_7b", "llama2_7b_1layer"):
        sizes |= yaml.safe_load((CHECKOUT / "conf" / "model" / f"{name}.yaml").read_text())
    del sizes["defaults"]
    return load_model(ModelConfig(**sizes), "random", torch.device("cpu"), torch.float32).eval()


@pytest.fixture(scope="module")
def questions(test_data: Path) -> list[list[int]]:
    """The first 20 instructions of Alpaca in LLaMA-2's tokens, 7 to 25 each."""
    tokenizer = Tokenizer(test_data / "llama2_tokenizer.model")
    records = json.loads((test_data / "alpaca_data_200.json").read_text())[:20]
    return [tokenizer.encode(record["instruction"], bos=True) for record in records]


@torch.inference_mode()
def generated(
    model: Transformer, prompts: list[list[int]], n_new: int, kv_cache: bool
) -> tuple[list[list[int]], Tensor]:
    """Greedy answers, and the logits that they were taken from, [n_new, B, V]."""
    state, found = GenerationState(model, prompts, n_new, kv_cache), []
    for _ in range(n_new):
        found.append(state.next_logits())
        state.append(found[-1].argmax(-1))
    return state.tokens[:, state.prompt_length :].tolist(), torch.stack(found)


@pytest.mark.slow
@torch.inference_mode()
def test_one_layer_of_7b_says_the_same_without_a_cache(one_layer, questions):
    """A batch of 20, padded on the left, with the cache, against each text by itself without one.

    Uncached decoding takes, after each prefix, what one forward over the whole says at that prefix's last position.
    """
    answers, cached = generated(one_layer, questions, N_PARITY, True)
    assert len({len(question) for question in questions}) > 5
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        places = torch.arange(len(question) - 1, len(question) - 1 + N_PARITY)
        logits = one_layer(torch.tensor([question + answer]), logits_at=places)
        assert logits.argmax(-1).tolist() == answer
        assert relative(cached[:, row], logits) <= 1e-5
    assert len({tuple(answer) for answer in answers}) == 20


def test_training_never_makes_a_cache(monkeypatch):
    monkeypatch.setattr(KVCache, "__init__", lambda *_: pytest.fail("a cache was made"))
    model = make_model(SIZES["MHA"])
    model(random_tokens(2, 9)).sum().backward()


def test_without_a_cache_none_is_made(monkeypatch):
    """Generation is whole without the code of the cache: it is not only unused."""
    monkeypatch.setattr(KVCache, "__init__", lambda *_: pytest.fail("a cache was made"))
    monkeypatch.setattr(LayerCache, "__init__", lambda *_: pytest.fail("a cache was made"))
    answers, _ = generated(make_model(SIZES["MHA"]), [[5, 6, 7], [9]], 8, False)
    assert [len(answer) for answer in answers] == [8, 8]


# docs/kv_cache.md

PAGE = (CHECKOUT / "docs" / "kv_cache.md").read_text(encoding="utf-8")
CACHE_NAMES = {"KVCache", "LayerCache", "NoCache", "Caches"}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its title row."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def listed_places() -> set[tuple[str, str]]:
    """(file, name) of the page's table; a cell without a file has that of the row above."""
    places, file = set(), ""
    for cells in rows("Where it is"):
        file = cells[0].strip("`") or file
        places.add((file, cells[1].strip("`")))
    return places


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Classes and functions with their full names, the outer ones first."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield prefix + node.name, node
            yield from definitions(node, f"{prefix}{node.name}.")


def uses_the_cache(node: ast.AST) -> bool:
    """Whether it names a class of the cache, or the cache that a state holds."""
    return any(
        (isinstance(inner, ast.Name) and inner.id in CACHE_NAMES)
        or (isinstance(inner, ast.Attribute) and ast.unparse(inner) == "self.cache")
        for inner in ast.walk(node)
    )


def test_the_page_lists_every_place_of_the_cache_and_no_other():
    own = "llama_ft/model/kv_cache.py"
    found = set()
    for file in sorted((CHECKOUT / "llama_ft").rglob("*.py")):
        name = file.relative_to(CHECKOUT).as_posix()
        for place, node in definitions(ast.parse(file.read_text(encoding="utf-8"))):
            is_use = isinstance(node, ast.FunctionDef) and uses_the_cache(node)
            if not place.endswith("__init__") if name == own else is_use:
                found.add((name, place))
    assert ("llama_ft/decoding/state.py", "GenerationState.next_logits") in found
    assert found == listed_places()


def sizes_of(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((CHECKOUT / "conf" / "model" / f"{name}.yaml").read_text()))


def test_the_pages_memory_is_that_of_the_real_class():
    table = rows("What it costs")
    assert len(table) == 5
    for name, *cells in table:
        for (batch, tokens), cell in zip(((1, 1), (1, 1024), (1, 4096), (8, 4096)), cells, strict=True):
            if cell == "–":
                assert tokens > sizes_of(name.split("`")[1]).max_seq_len
                continue
            cache = KVCache(sizes_of(name.split("`")[1]), batch, tokens, torch.float16, "meta")
            assert float(cell.replace(",", "")) == pytest.approx(cache.nbytes / 2**20, abs=5e-5), name
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Transformer(sizes_of("llama2_7b")).parameters())
    assert f"7B's weights are {2 * weights / 2**20:,.0f} MiB in 16 bit" in PAGE


def test_the_pages_line_of_code_prints_what_its_table_says(capsys):
    (line,) = re.findall(r"^python -c .*$", PAGE, re.MULTILINE)
    exec(shlex.split(line)[2], {})
    assert f"{float(capsys.readouterr().out):,.0f}" == rows("What it costs")[1][3] == "2,048"


@functools.cache
def builtin_model() -> Transformer:
    return load_model(sizes_of("tiny"), "builtin", torch.device("cpu"), torch.float32).eval()


def answered(command: str) -> str:
    """What a command of the page prints, without starting it."""
    config = cli.composed_config("generate", shlex.split(command)[3:], GenerateConfig)
    prompt = config.prompt if config.prompt is not None else prompt_text(str(config.instruction), config.input or "")
    tokenizer = Tokenizer(config.tokenizer_file)
    ((answer,),) = generate(builtin_model(), tokenizer, [prompt], config.decoding, config.kv_cache)
    return f"{answer.text}\n"


def test_the_pages_texts_are_the_built_in_models():
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        parts = re.findall(r"^\$ ([^\n]*)\n(.*?)(?=^\$ |\Z)", block, re.MULTILINE | re.DOTALL)
        (with_cache, text), (without, same) = parts
        assert with_cache.replace("kv_cache=true", "kv_cache=false") == without != with_cache
        assert text == same == answered(with_cache) == answered(without)
