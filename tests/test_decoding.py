"""Ways to choose tokens, beam search and streamed text, against hand-worked cases, transformers and brute force."""

import base64
import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from llama_ft.config import PACKAGE_DIR, DecodingConfig, UserError
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.beam import Hypothesis, beam_search
from llama_ft.decoding.sampling import choose, keep_top_k, keep_top_p, process, repetition_penalty
from llama_ft.decoding.text import StopAt, TextStream

INF = math.inf
VOCAB_SIZE = 50
deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=60)


# Sampling


def logits_of(probabilities: Sequence[float]) -> Tensor:
    """Logits, fp32 [1, V], shifted by a constant, which means nothing."""
    return torch.tensor([probabilities]).log() + 0.5


def kept(logits: Tensor) -> set[int]:
    return {token for token, logit in enumerate(logits[0].tolist()) if logit > -INF}


def sampled(**options: float) -> DecodingConfig:
    return DecodingConfig(sample=True, **options)


def unseen(logits: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool)


def random_logits(rows: int = 6, vocab_size: int = 200, seed: int = 0) -> Tensor:
    return 4 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, {3}), (2, {1, 3}), (3, {0, 1, 2, 3}), (4, {0, 1, 2, 3}), (5, {0, 1, 2, 3, 4}), (0, {0, 1, 2, 3, 4})],
)
def test_top_k_keeps_what_equals_the_kth(k, expected):
    logits = torch.tensor([[1.0, 2.0, 1.0, 3.0, -1.0]])
    assert kept(keep_top_k(logits, k)) == expected
    assert keep_top_k(logits, 99).equal(logits)


@pytest.mark.parametrize(
    ("p", "expected"), [(0.49, {2}), (0.51, {0, 2}), (0.79, {0, 2}), (0.81, {0, 2, 3}), (0.96, {0, 1, 2, 3})]
)
def test_top_p_is_the_smallest_set_that_reaches_p(p, expected):
    assert kept(keep_top_p(logits_of([0.3, 0.05, 0.5, 0.15]), p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.125, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (1.0, 4)]
)
def test_top_p_reached_exactly_and_ties(p, expected):
    """Four equal tokens have exactly 1/4 each, so the set at p = 1/2 has two; those with the lowest ids."""
    assert kept(keep_top_p(torch.full((1, 4), 1.7), p)) == set(range(expected))


def test_repetition_penalty_divides_positive_and_multiplies_negative():
    logits = torch.tensor([[3.0, -3.0, 0.0, 3.0, -3.0, -INF]])
    seen = torch.tensor([[True, True, True, False, False, True]])
    assert repetition_penalty(logits, seen, 1.5).tolist() == [[2.0, -4.5, 0.0, 3.0, -3.0, -INF]]
    assert repetition_penalty(logits, seen, 1.0).equal(logits)


@pytest.mark.parametrize("seed", range(3))
def test_each_step_equals_that_of_transformers(seed):
    logits = random_logits(seed=seed)
    ids = torch.randint(200, (6, 30), generator=torch.Generator().manual_seed(seed))
    seen = unseen(logits).scatter(1, ids, True)
    for value in (0.3, 1.0, 1.7):
        penalised = transformers.RepetitionPenaltyLogitsProcessor(value)(ids, logits)
        assert repetition_penalty(logits, seen, value).equal(penalised)
        warped = transformers.TemperatureLogitsWarper(value)(ids, logits)
        assert process(logits, sampled(temperature=value), seen).equal(warped)
    for k in (1, 7, 199, 200, 500):
        assert keep_top_k(logits, k).equal(transformers.TopKLogitsWarper(k)(ids, logits))
    for p in (0.01, 0.3, 0.9, 0.99):
        assert keep_top_p(logits, p).equal(transformers.TopPLogitsWarper(p)(ids, logits))


def test_order_of_the_steps_is_that_of_transformers():
    logits, ids = random_logits(), torch.arange(180).view(6, 30)
    order = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
            transformers.TemperatureLogitsWarper(2.5),
            transformers.TopKLogitsWarper(40),
            transformers.TopPLogitsWarper(0.8),
        ]
    )
    config = sampled(temperature=2.5, top_k=40, top_p=0.8, repetition_penalty=1.3)
    assert process(logits, config, unseen(logits).scatter(1, ids, True)).equal(order(ids, logits))


def test_off_is_a_value():
    logits = random_logits()
    assert process(logits, sampled(), unseen(logits)).equal(logits)
    assert process(logits, sampled(top_k=200), ~unseen(logits)).equal(logits)
    rounds_to_nothing = torch.tensor([[0.0, -200.0, -INF]])
    assert keep_top_p(rounds_to_nothing, 1.0).equal(rounds_to_nothing)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (sampled(), [0.5, 0.3, 0.15, 0.05, 0.0]),
        (sampled(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365, 0.0]),
        (sampled(top_k=2), [0.625, 0.375, 0.0, 0.0, 0.0]),
        (sampled(top_p=0.9), [10 / 19, 6 / 19, 3 / 19, 0.0, 0.0]),
    ],
    ids=["all", "temperature", "top_k", "top_p"],
)
def test_frequencies_are_the_probabilities(config, expected):
    n = 40_000
    logits = logits_of([0.5, 0.3, 0.15, 0.05, 0.0]).expand(n, -1)
    chosen = choose(logits, config, unseen(logits), [torch.Generator().manual_seed(1)])
    counts = chosen.bincount(minlength=5).tolist()
    for count, probability in zip(counts, expected, strict=True):
        # Five standard deviations of a binomial count: a right sampler is outside once in a million seeds.
        assert abs(count - n * probability) <= 5 * math.sqrt(n * probability * (1 - probability))


def test_draws_of_a_row_are_independent_from_step_to_step():
    n, generator = 20_000, torch.Generator().manual_seed(2)
    logits = logits_of([0.25, 0.75]).expand(n, -1)
    first, second = (choose(logits, sampled(), unseen(logits), [generator]) for _ in range(2))
    for a, b in itertools.product((0, 1), repeat=2):
        probability = (0.25, 0.75)[a] * (0.25, 0.75)[b]
        count = int(((first == a) & (second == b)).sum())
        assert abs(count - n * probability) <= 5 * math.sqrt(n * probability * (1 - probability))


def test_seed_reproduces_and_other_rows_do_not_matter():
    config, logits = sampled(temperature=3.0), random_logits(rows=4)
    others = torch.cat((logits[:1], random_logits(rows=3, seed=9)))

    def draws(logits: Tensor, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(logits, config, unseen(logits), [generator]).tolist() for _ in range(20)]

    assert draws(logits, 5) == draws(logits, 5) != draws(logits, 6)
    assert [row[0] for row in draws(logits, 5)] == [row[0] for row in draws(others, 5)]


def test_greedy_takes_the_most_probable_after_the_penalty():
    logits = torch.tensor([[2.0, 3.0, 2.5], [1.0, 1.0, 0.0]])
    seen = torch.tensor([[False, True, False], [False, False, False]])
    assert choose(logits, DecodingConfig(), seen).tolist() == [1, 0]
    assert choose(logits, DecodingConfig(repetition_penalty=1.3), seen).tolist() == [2, 0]
    assert choose(logits[:1], sampled(top_k=1), seen[:1], [torch.Generator()]).tolist() == [1]
    assert choose(logits[:1], sampled(top_p=1e-6), seen[:1], [torch.Generator()]).tolist() == [1]
    assert choose(1e4 * logits[:1], sampled(temperature=1e-6), seen[:1], [torch.Generator()]).tolist() == [1]


@pytest.mark.parametrize("row", [[0.0, math.nan], [0.0, INF], [-INF, -INF]])
@pytest.mark.parametrize("config", [DecodingConfig(), sampled(top_k=1), sampled(top_p=0.5)])
def test_logits_that_are_no_distribution_are_refused(config, row):
    logits = torch.tensor([[0.0, 1.0], row])
    with pytest.raises(UserError, match="logits are not finite"):
        choose(logits, config, unseen(logits), [torch.Generator()])


# Beam search


class FakeState:
    """A state with the logits of any function of the rows' tokens."""

    def __init__(self, prompt: list[int], rows: int, logits: Callable[[Tensor], Tensor]) -> None:
        self.tokens = torch.tensor([prompt] * rows)
        self.prompt_length = len(prompt)
        self._logits = logits

    def next_logits(self) -> Tensor:
        return self._logits(self.tokens)

    def append(self, tokens: Tensor) -> None:
        self.tokens = torch.cat((self.tokens, tokens[:, None]), dim=1)

    def reorder(self, rows: Tensor) -> None:
        self.tokens = self.tokens[rows]


# The tree of https://huggingface.co/blog/how-to-generate: the probability of each next word after the words so far.
WORDS = ["<eos>", *"The nice dog car woman house guy has runs and is drives turns".split()]
TREE = {
    "The": {"nice": 0.5, "dog": 0.4, "car": 0.1},
    "The nice": {"woman": 0.4, "house": 0.3, "guy": 0.3},
    "The dog": {"has": 0.9, "runs": 0.05, "and": 0.05},
    "The car": {"is": 0.3, "drives": 0.5, "turns": 0.2},
}


def words(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def tree_logits(tokens: Tensor) -> Tensor:
    # Spare beams may go where no word leads.
    rows = [TREE.get(words(row), {"<eos>": 1.0}) for row in tokens.tolist()]
    return torch.tensor([[row.get(word, 0.0) for word in WORDS] for row in rows]).log()


def test_textbook_tree():
    """Greedily "nice woman", 0.5 * 0.4; two beams find "dog has", 0.4 * 0.9, which begins with the second best word."""
    state = FakeState([WORDS.index("The")], 1, tree_logits)
    for _ in range(2):
        logits = state.next_logits()
        state.append(choose(logits, DecodingConfig()))
    assert words(state.tokens[0].tolist()) == "The nice woman"

    def search(n_beams: int, n_return: int = 1) -> list[tuple[str, float]]:
        state = FakeState([WORDS.index("The")], n_beams, tree_logits)
        found = beam_search(state, n_beams, max_new_tokens=2, ends=[0], length_penalty=0.0, n_return=n_return)
        return [(words(hypothesis.tokens), round(math.exp(hypothesis.score), 5)) for hypothesis in found]

    assert search(1) == [("nice woman", 0.2)]
    assert search(2, n_return=2) == [("dog has", 0.36), ("nice woman", 0.2)]
    found = search(9, n_return=9)  # more rows than there are words to begin with: every path, and none twice
    assert [text for text, _ in found[:2]] == ["dog has", "nice woman"]
    assert sorted(text for text, _ in found) == sorted(
        f"{first} {second}" for first in ("nice", "dog", "car") for second in TREE[f"The {first}"]
    )
    assert sum(probability for _, probability in found) == pytest.approx(1)


def test_score_divides_by_the_length():
    state = FakeState([WORDS.index("The")], 2, tree_logits)
    best = beam_search(state, 2, max_new_tokens=2, ends=[0], length_penalty=2.0)[0]
    assert best.score == pytest.approx(math.log(0.36) / 4)


def test_wide_beams_find_the_best_of_all():
    """With a beam for every sequence the search leaves nothing out."""
    n_tokens, eos_id, max_new_tokens = 4, 0, 3
    table = random_logits(rows=n_tokens**3, vocab_size=n_tokens, seed=3).log_softmax(-1)

    def log_probs(tokens: Tensor) -> Tensor:
        powers = n_tokens ** torch.arange(3)
        return table[(tokens[:, -3:] * powers[: tokens.shape[1]]).sum(1)]

    totals = {}
    for tokens in itertools.product(range(n_tokens), repeat=max_new_tokens):
        end = tokens.index(eos_id) + 1 if eos_id in tokens else max_new_tokens
        sequence = torch.tensor([[1, *tokens]])
        steps = [float(log_probs(sequence[:, :i])[0, sequence[0, i]]) for i in range(1, end + 1)]
        totals[tokens[:end]] = sum(steps)
    expected = sorted(totals.items(), key=lambda item: item[1], reverse=True)

    n_beams = n_tokens**max_new_tokens
    found = beam_search(FakeState([1], n_beams, log_probs), n_beams, max_new_tokens, [eos_id], 0.0, n_return=n_beams)
    assert [tuple(hypothesis.tokens) for hypothesis in found] == [tokens for tokens, _ in expected]
    assert [hypothesis.score for hypothesis in found] == pytest.approx([total for _, total in expected], abs=1e-5)


@cache
def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # large enough for tokens to differ much in probability
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def llama_logits(tokens: Tensor) -> Tensor:
    return llama()(tokens, use_cache=False).logits[:, -1]


PROMPT, MAX_NEW_TOKENS = [1, 17, 30, 8], 10


@torch.no_grad()
def by_transformers(n_beams: int, ends: list[int], **numbers: float) -> list[Hypothesis]:
    """What transformers finds."""
    output = llama().generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        num_beams=n_beams,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=ends,
        pad_token_id=ends[0],
        bos_token_id=None,
        num_return_sequences=n_beams,
        return_dict_in_generate=True,
        output_scores=True,
        **numbers,
    )
    found = []
    for sequence, score in zip(output.sequences.tolist(), output.sequences_scores.tolist(), strict=True):
        tokens = sequence[len(PROMPT) :]
        end = next((index for index, token in enumerate(tokens, 1) if token in ends), len(tokens))
        found.append(Hypothesis(tokens[:end], score))
    return found


# Tokens that the model often gives, so that they do end hypotheses.
OFTEN, ALSO = 45, 37


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize(("n_beams", "ends"), [(2, [OFTEN]), (3, [ALSO]), (6, [OFTEN]), (3, [ALSO, OFTEN, 8, 20])])
def test_beam_search_equals_that_of_transformers(n_beams, ends, length_penalty, early_stopping):
    numbers = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    state = FakeState(PROMPT, n_beams, llama_logits)
    found = beam_search(state, n_beams, MAX_NEW_TOKENS, ends, n_return=n_beams, **numbers)
    truth = by_transformers(n_beams, ends, **numbers)
    assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in truth]
    scores = [hypothesis.score for hypothesis in truth]
    assert [hypothesis.score for hypothesis in found] == pytest.approx(scores, rel=1e-5)


def test_what_beam_search_returns_depends_on_each_number():
    """Else the comparison with transformers would say little."""

    def search(eos_id: int = OFTEN, n_beams: int = 6, n_return: int = 6, **numbers: float) -> list[list[int]]:
        state = FakeState(PROMPT, n_beams, llama_logits)
        found = beam_search(state, n_beams, MAX_NEW_TOKENS, [eos_id], n_return=n_return, **numbers)
        return [hypothesis.tokens for hypothesis in found]

    ends = {(tokens[-1] == OFTEN, len(tokens) < MAX_NEW_TOKENS) for tokens in search(length_penalty=0.0)}
    assert (True, True) in ends
    assert any(tokens[-1] != OFTEN and len(tokens) == MAX_NEW_TOKENS for tokens in search(length_penalty=2.0))
    assert search() != search(early_stopping=True)
    assert search(length_penalty=-1.0) != search() != search(length_penalty=2.0)
    assert search()[:1] != search(n_beams=2, n_return=1)
    assert search(n_return=2) == search()[:2]


def test_one_beam_is_greedy():
    state = FakeState(PROMPT, 1, llama_logits)
    for _ in range(MAX_NEW_TOKENS):
        logits = state.next_logits()
        state.append(choose(logits, DecodingConfig()))
    greedy = state.tokens[0, len(PROMPT) :].tolist()
    never = min(set(range(VOCAB_SIZE)) - set(greedy))
    for eos_id, end in [(never, MAX_NEW_TOKENS), (greedy[4], greedy.index(greedy[4]) + 1)]:
        found = beam_search(FakeState(PROMPT, 1, llama_logits), 1, MAX_NEW_TOKENS, [eos_id])
        assert [hypothesis.tokens for hypothesis in found] == [greedy[:end]]


def test_beam_search_refuses_logits_that_are_no_distribution():
    state = FakeState([1], 2, lambda tokens: torch.full((2, 5), math.nan))
    with pytest.raises(UserError, match="logits are not finite"):
        beam_search(state, 2, 3, ends=[0])


# Streamed text

TINY = PACKAGE_DIR / "model" / "tiny" / "tokenizer.model"
TINY_VOCAB_SIZE = 2048
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # Hugging Face's stand-ins for bytes
BYTES = [bytes([value]) for value in range(256)]


def tiktoken_of_bytes(folder: Path) -> Path:
    """Llama 3's format of Meta with a token for each byte, and no other."""
    file = folder / "tokenizer.model"
    file.write_bytes(b"\n".join(base64.b64encode(byte) + b" %d" % rank for rank, byte in enumerate(BYTES)))
    return file


def tokenizer_json_of_bytes(folder: Path) -> Path:
    """Llama 3's format of Hugging Face with a token for each byte, and the special ones."""
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=["tiny", "tiktoken", "tokenizer_json"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    files = {"tiny": lambda _: TINY, "tiktoken": tiktoken_of_bytes, "tokenizer_json": tokenizer_json_of_bytes}
    return Tokenizer(files[request.param](folder))


def check_stream(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> None:
    """Pushes and flush give the continuation; nothing certain is held back, but for what might be half a character."""
    before = tokenizer.decode(prompt)
    expected = tokenizer.decode(prompt + answer)[len(before) :]
    stream, given = TextStream(tokenizer), ""
    for n, token in enumerate(answer, start=1):
        given += stream.push(token)
        so_far = tokenizer.decode(prompt + answer[:n])[len(before) :]
        assert expected.startswith(given)
        assert so_far.startswith(given)
        assert so_far[len(given) :] in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3)
        if not so_far.endswith("\ufffd"):
            assert given == so_far
    assert given + stream.flush() == expected
    assert stream.flush() == ""


special = st.sampled_from(" \n\täöüßÄ🙂👩‍🔬🇩🇪€é日\ufffd")
texts = st.text(special | st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=16)


@deterministic
@given(text=texts)
@example("  Grüße, \n\n 👩‍🔬 says:  hi \n")
@example("\ufffd\ufffd🙂\ufffd\ufffd\ufffd\ufffdx")
def test_stream_of_a_text_at_every_split(tokenizer, text):
    start = tokenizer.encode("Say:", bos=True)
    ids = tokenizer.encode(text, eos=True)
    whole = tokenizer.decode(start + ids)
    for split in range(len(ids) + 1):
        prompt = start + ids[:split]
        # A prompt is text, so it ends between characters.
        before = tokenizer.decode(prompt)
        if whole.startswith(before) and not before.endswith("\ufffd"):
            check_stream(tokenizer, prompt, ids[split:])


@deterministic
@given(data=st.data())
def test_stream_of_bytes_that_are_no_utf8(tokenizer, data):
    """Any bytes, some of them beginnings of characters, with words and special tokens between."""
    fragments = ["🙂".encode()[:3], "€".encode()[:2], "ü".encode()[:1], b"\x80", b"\xff", b"\xf0\x9f", b"\xed\xa0\x80"]
    whole = ["🙂".encode(), "€".encode(), "\ufffd".encode(), b"a", b" "]
    runs = data.draw(st.lists(st.one_of(st.sampled_from(fragments + whole), st.binary(max_size=3)), max_size=8))
    others = [tokenizer.eos_id, *tokenizer.encode("word it")]
    ids = []
    for run in runs:
        ids += byte_tokens(tokenizer, run)
        ids += data.draw(st.lists(st.sampled_from(others), max_size=1))
    check_stream(tokenizer, tokenizer.encode("Say:", bos=True), ids)


def byte_tokens(tokenizer: Tokenizer, run: bytes) -> list[int]:
    """The tokens that are these bytes, one each."""
    return [ids_of_bytes(tokenizer)[value] for value in run]


@cache
def ids_of_bytes(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.vocab_size == TINY_VOCAB_SIZE:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(TINY))
        return [processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
    if tokenizer.vocab_size == 256 + 256:
        return list(range(256))  # tiktoken's ranks
    # GPT-2 writes printable bytes as themselves, and the others as the letters from U+0100 on.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [value for value in range(256) if value not in plain]
    letters = [chr(value) if value in plain else chr(256 + other.index(value)) for value in range(256)]
    return [LETTERS.index(letter) for letter in letters]


def test_stream_of_an_emoji_in_bytes(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in byte_tokens(tokenizer, "a🙂".encode())] == ["a", "", "", "", "🙂"]


def test_stream_of_endless_bad_bytes_goes_on(tokenizer):
    stream = TextStream(tokenizer)
    given = "".join(map(stream.push, byte_tokens(tokenizer, b"\xff" * 100)))
    assert given == "\ufffd" * 97
    assert stream.flush() == "\ufffd" * 3


def test_stream_keeps_the_first_space():
    tokenizer = Tokenizer(TINY)
    ids = tokenizer.encode("the answer")
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == " the answer"
    assert tokenizer.decode(ids) == "the answer"


# Stop strings


def first_stop(text: str, strings: Sequence[str]) -> tuple[str, str | None]:
    """The text before the first stop string, and that string, read character by character."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deterministic, max_examples=200)
@given(
    strings=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("ab\n", max_size=3), max_size=8),
)
@example(strings=["aab"], pieces=["a", "a", "a", "b"])
@example(strings=["abc", "b"], pieces=["ab"])
@example(strings=["b", "ab"], pieces=["a", "b"])
def test_stop_strings_wherever_pieces_are_cut(strings, pieces):
    expected = first_stop("".join(pieces), strings)
    stop, given = StopAt(strings), ""
    for n, piece in enumerate(pieces, start=1):
        given += stop.push(piece)
        text, found = first_stop("".join(pieces[:n]), strings)
        assert stop.found == found
        # Held back is the longest end of the text that begins a stop string, and no more.
        begins = {string[:length] for string in strings for length in range(len(string))} | {""}
        held = "" if found else max((start for start in begins if text.endswith(start)), key=len)
        assert given == text[: len(text) - len(held)]
    assert (given + stop.flush(), stop.found) == expected
    assert stop.flush() == ""


@pytest.mark.parametrize("text", ["An answer.\n\n### Instruction:\nmore", "Grüße 🙂\n\n### Instr", "### Instruction:"])
def test_stop_string_over_the_tokens_of_a_text(tokenizer, text):
    stream, stop, given = TextStream(tokenizer), StopAt(["### Instruction:", "🙃"]), ""
    for token in tokenizer.encode(text):
        given += stop.push(stream.push(token))
    given += stop.push(stream.flush()) + stop.flush()
    expected, found = first_stop(text, ["### Instruction:", "🙃"])
    assert (given.removeprefix(" "), stop.found) == (expected, found)
