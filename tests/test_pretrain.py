"""The built-in model: what it read before anyone instructed it, how it was trained, and the files that ship."""

import hashlib
import json
import re
from itertools import islice
from random import Random

import pytest
import torch
from conftest import CHECKOUT
from omegaconf import OmegaConf

from dev import pretrain, sample
from dev.textbook import CLOSE, OPEN, TOPICS, lessons, pages, wordings
from llama_ft.config import PACKAGE_DIR, DecodingConfig, ModelConfig, ModelSource, UserError
from llama_ft.data.dataset import SAMPLE_DIR
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import generate
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model

TINY = PACKAGE_DIR / "model" / "tiny"
SMALL = ModelConfig("tiny", dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=48, vocab_size=2048, max_seq_len=1024)


@pytest.fixture(scope="module")
def text() -> str:
    whole = [*islice(pages(Random(pretrain.SEED)), 2500), *islice(lessons(Random(1), is_short=False), 5000)]
    return re.sub(f"[{OPEN}{CLOSE}]", "", "\n".join(whole))


@pytest.fixture(scope="module")
def heldout() -> list[dict[str, str]]:
    file = SAMPLE_DIR / "heldout.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_task_has_its_topic_and_every_topic_its_wordings(text: str) -> None:
    assert TOPICS.keys() == wordings()["topics"].keys() == {task.name for task in sample.TASKS} | {"copy"}
    assert "plural" in text
    assert "{" not in text


def test_the_text_repeats_with_its_seed() -> None:
    first, again, other = (list(islice(pages(Random(seed)), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_no_question_of_the_sample_data_is_in_the_text(text: str, heldout: list[dict[str, str]]) -> None:
    # But for "Who lost the key?", which is nothing without its text.
    asked = {record["instruction"] for record in heldout if record["task"] != "who"}
    assert len(asked) > 100
    assert not [instruction for instruction in asked if instruction in text]
    assert "###" not in text


def test_no_text_of_a_heldout_question_is_in_the_text(text: str, heldout: list[dict[str, str]]) -> None:
    drawn = ("first_word", "last_word", "count_words", "find_colour", "who", "sentiment")
    sentences = set()
    for record in heldout:
        if record["task"] in drawn:
            asked = record["input"].removeprefix("Text: ") or record["instruction"].partition('"')[2]
            sentences.add(re.split(r"\n|\" Is that|\"$", asked)[0])
    assert len(sentences) > 90
    assert not [sentence for sentence in sentences if f"\n{sentence}\n" in text or f'"{sentence}"' in text]


def test_no_pair_of_numbers_of_a_heldout_question_is_compared_in_the_text(
    text: str, heldout: list[dict[str, str]]
) -> None:
    pairs = {
        frozenset(re.findall(r"\d+", record["instruction"] + record["input"]))
        for record in heldout
        if record["task"] == "larger_number"
    }
    found = {frozenset(pair) for pair in re.findall(r"(\d\d) is (?:larger|smaller) than (\d\d)", text)}
    found |= {frozenset(pair) for pair in re.findall(r"Which is larger, (\d\d) or (\d\d)", text)}
    assert len(found) > 100
    assert not pairs & found


# Training


def test_pretraining_repeats_to_the_bit_and_learns() -> None:
    tokenizer = Tokenizer(ModelSource(model=SMALL).tokenizer_file)
    models = [Transformer(SMALL), Transformer(SMALL)]
    losses = [pretrain.pretrain(model, tokenizer, 12) for model in models]
    assert losses[0] == losses[1] < pretrain.pretrain(Transformer(SMALL), tokenizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_an_answer_counts_ten_times_as_much_with_the_token_that_ends_it() -> None:
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    tokens, weights = pretrain.encode(f"The plural\nfox\n{OPEN}foxes{CLOSE}\nOnce more\n", tokenizer)
    assert tokens == tokenizer.encode("The plural\nfox\nfoxes\nOnce more\n", bos=True, eos=True)
    counted = [token for token, weight in zip(tokens, weights, strict=True) if weight == 1]
    assert tokenizer.decode(counted).strip(" ") == "foxes\n"
    assert set(weights) == {1.0, pretrain.REST}


def test_lessons_mark_their_answers() -> None:
    marked = [lesson for lesson in islice(lessons(Random(3), is_short=True), 400) if OPEN in lesson]
    assert len(marked) > 300
    for lesson in marked:
        rest = lesson.partition(OPEN)[2]
        answer, closed, _ = rest.partition(CLOSE)
        assert answer
        assert closed
    # "91 is larger than 60." begins with what is asked for: the rest say first what it depends on.
    assert sum(lesson.startswith(OPEN) for lesson in marked) < 0.05 * len(marked)


def test_short_lessons_come_first_and_padding_never_counts() -> None:
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    batches = list(pretrain.batches(tokenizer, 10))
    widths = [tokens.shape[1] for tokens, _ in batches]
    assert max(widths[:4]) < pretrain.SHORT
    assert set(widths[5::2]) == {pretrain.PAGE_LENGTH + 1}
    tokens, weights = batches[0]
    assert (weights > 0)[:, :5].all()
    assert not weights[tokens == 0].any()


# The files


def test_the_checksums_are_those_of_the_files() -> None:
    sums = dict(reversed(line.split("  ")) for line in (TINY / pretrain.CHECKSUMS).read_text().splitlines())
    assert sums.keys() == {"model.safetensors", "tokenizer.model"}
    assert sums == {name: hashlib.sha256((TINY / name).read_bytes()).hexdigest() for name in sums}


def test_model_and_tokenizer_are_small_and_have_a_card() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir() if file.is_file()) <= 8 * 2**20
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert "python -m dev.pretrain" in card
    assert hashlib.sha256((TINY / "model.safetensors").read_bytes()).hexdigest() in card


FACTS = {
    "The plural of wolf is": " wolves",
    "The opposite of hot is": " cold",
    "The past tense of go is": " went",
    "Write this down: silver lamp\n": "silver lamp",
}


@pytest.mark.parametrize("prompt", FACTS)
def test_the_builtin_model_knows_what_it_read(prompt: str) -> None:
    sizes = OmegaConf.to_container(OmegaConf.load(CHECKOUT / "conf" / "model" / "tiny.yaml"))
    model = load_model(ModelConfig(**sizes), "builtin", torch.device("cpu"), torch.float32).eval()
    decoding = DecodingConfig(max_new_tokens=12)
    ((answer,),) = generate(model, Tokenizer(TINY / "tokenizer.model"), [prompt], decoding)
    assert answer.text.startswith(FACTS[prompt])


def test_weights_of_other_sizes_are_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"model.dim is 32 but the file has 192.*needs checkpoint=random"):
        load_model(SMALL, "builtin", torch.device("cpu"), torch.float32)
