"""Llama 3's tokenizers, `tokenizer.json` and Meta's `tokenizer.model`, against what their packages say by themselves.

One small vocabulary is trained and written in both formats.
"""

import base64
import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from llama_ft.config import PACKAGE_DIR, DataConfig, ModelConfig, TrainConfig, UserError
from llama_ft.data.dataset import load_data
from llama_ft.data.prompt import prompt_text
from llama_ft.data.records import Record
from llama_ft.data.template import ALPACA_TEMPLATE
from llama_ft.data.tokenizer import Tokenizer, check_vocabulary

TINY = PACKAGE_DIR / "model" / "tiny" / "tokenizer.model"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# As Meta publishes it, in parts.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
SPLIT += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = ["The cat sat on the mat, and they'll say it's 12345 times better.\n\n### Response:\n- one\n"] * 20
TEXTS = [
    "",
    "The cat sat.",
    " the  mat \n\n\n",
    "they'LL it's 1234567",
    "### Response:\n- one",
    "日本 é 🙂\x00\t",
    f"{BOS}text{EOS}<|reserved_special_token_0|></s>",
]


@dataclass(frozen=True)
class Files:
    """The same vocabulary in both formats."""

    json: Path
    model: Path

    def tokenizer(self, name: str) -> Tokenizer:
        return Tokenizer(self.file(name))

    def file(self, name: str) -> Path:
        return self.json if name == "json" else self.model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("llama3")
    trained = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    base = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    # Tokens' bytes, from how a byte-level decoder reads each of them.
    byte_of = {trained.token_to_id(letter): value for letter, value in zip(*letters_of_bytes(), strict=True)}
    letters = {base[number]: bytes([value]) for number, value in byte_of.items()}
    lines = [base64.b64encode(b"".join(letters[letter] for letter in token)) for token in base]
    (folder / "tokenizer.model").write_bytes(b"".join(b"%s %d\n" % (line, rank) for rank, line in enumerate(lines)))
    trained.add_special_tokens([BOS, EOS, *(f"<|reserved_special_token_{number}|>" for number in range(254))])
    trained.post_processor = processors.TemplateProcessing(
        f"{BOS} $A", special_tokens=[(BOS, trained.token_to_id(BOS))]
    )
    trained.enable_truncation(8)
    trained.enable_padding(length=16)
    trained.save(str(folder / "tokenizer.json"))
    return Files(folder / "tokenizer.json", folder / "tokenizer.model")


def letters_of_bytes() -> tuple[list[str], list[int]]:
    """The letters that stand for bytes in byte-level vocabularies (GPT-2's table), and the bytes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in visible]
    return [*map(chr, visible), *(chr(256 + number) for number in range(len(others)))], [*visible, *others]


@pytest.fixture(scope="module", params=["json", "model"])
def tokenizer(request: pytest.FixtureRequest, files: Files) -> Tokenizer:
    return files.tokenizer(request.param)


@pytest.mark.parametrize("text", [text for text in TEXTS if BOS not in text])
def test_ids_are_those_of_the_packages(files, text, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    reference = tokenizers.Tokenizer.from_file(str(files.json))
    reference.no_truncation()
    reference.no_padding()
    expected = reference.encode(text, add_special_tokens=False).ids
    assert files.tokenizer("json").encode(text) == expected
    assert files.tokenizer("json").encode(text, bos=True) == reference.encode(text).ids  # its template adds BOS
    ranks = tiktoken.load.load_tiktoken_bpe(str(files.model))
    encoding = tiktoken.Encoding("reference", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    assert files.tokenizer("model").encode(text) == encoding.encode(text) == expected


def test_special_tokens(tokenizer):
    """The base vocabulary, then BOS, EOS and 254 others: Llama 3 has 128,000 + 256 so."""
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (556, 300, 301)
    ids = tokenizer.encode("The cat", bos=True, eos=True)
    assert ids == [300, *tokenizer.encode("The cat"), 301]
    assert len(ids) < len("The cat")
    assert tokenizer.decode([*ids, 302, 555]) == "The cat"


@pytest.mark.parametrize("text", TEXTS)
def test_text_cannot_spell_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(token < 300 for token in ids)
    assert tokenizer.decode(ids) == text


def test_both_formats_say_the_same(files):
    first, second = files.tokenizer("json"), files.tokenizer("model")

    @settings(derandomize=True, deadline=None)
    @given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text: str) -> None:
        ids = first.encode(text)
        assert second.encode(text) == ids
        assert first.decode(ids) == second.decode(ids) == text

    check()


@pytest.mark.parametrize("output", ["one", "\n- one", " one", "", "日本"])
def test_prompt_and_answer_share_out_the_tokens(tokenizer, output):
    sample = ALPACA_TEMPLATE.sample(Record("Say it.", "", output), tokenizer)
    prompt, answer = sample.tokens[: sample.n_prompt], sample.tokens[sample.n_prompt :]
    assert (prompt[0], answer[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(prompt) + tokenizer.decode(answer) == prompt_text("Say it.") + output
    assert tokenizer.decode(answer).removeprefix(":") == output  # the colon, where one token holds both


@pytest.mark.parametrize("name", ["json", "model"])
def test_data_is_read_with_it_where_it_is_the_models(files, name):
    def config(vocab_size: int) -> TrainConfig:
        model = ModelConfig(name="mine", vocab_size=vocab_size, max_seq_len=1024)
        return TrainConfig(model, "random", str(files.file(name)), data=DataConfig("sample"))

    dataset = load_data(config(556))
    assert max(token for sample in dataset.samples for token in sample.tokens) == 301
    with pytest.raises(UserError, match="has 556 pieces, but model=mine has a vocabulary of 557"):
        load_data(config(557))


@pytest.mark.parametrize(("name", "package"), [("json", "tokenizers"), ("model", "tiktoken")])
def test_a_missing_package_is_named(files, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf" needs the package {package}: pip install 'llama_ft\[llama3\]'$"):
        files.tokenizer(name)


def bpe(folder: Path, special: list[str], begin: str | None, **settings: object) -> Path:
    """A byte-level BPE with the special tokens first, as SmolLM's, and tokenizer_config.json, for transformers too."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    trained.train_from_iterator(CORPUS, trainer)
    if begin is not None:
        template = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, trained.token_to_id(begin))])
        trained.post_processor = template
    trained.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


SMOL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("begin", "settings"),
    [
        (None, {"bos_token": SMOL[0], "eos_token": SMOL[0]}),
        (SMOL[1], {"bos_token": SMOL[1], "eos_token": {"__type": "AddedToken", "content": SMOL[2]}}),
        (SMOL[1], {"bos_token": SMOL[1], "eos_token": SMOL[2], "add_bos_token": True}),
    ],
)
def test_any_byte_level_bpe_is_read_as_by_transformers(tmp_path, begin, settings):
    theirs = AutoTokenizer.from_pretrained((file := bpe(tmp_path / "smol", SMOL, begin, **settings)).parent)
    ours = Tokenizer(file)
    for text in [*TEXTS, prompt_text("Say it.")]:
        assert ours.encode(text, bos=True) == theirs(text).input_ids
        assert ours.decode(ours.encode(text, bos=True, eos=True)) == text
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    assert ours.end_ids == {theirs.eos_token_id}
    assert min(ours.encode(" ".join(SMOL))) > 2  # text cannot spell them


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer_config.json", {"eos_token": "<|end|>"}), ("config.json", {"eos_token_id": [300, -1, 5]})],
)
def test_an_end_need_not_be_called_special(tmp_path, name, content):
    file = bpe(tmp_path / "chat", SMOL, None)
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    assert tokenizer.get_vocab_size() == 300
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.save(str(file))
    file.with_name(name).write_text(json.dumps(content))
    ours = Tokenizer(file)
    assert (ours.eos_id, ours.vocab_size) == (300, 301)
    text = "one<|end|>two"
    assert 300 not in ours.encode(text)
    assert ours.decode(ours.encode(text, eos=True)) == text


def test_every_file_may_name_an_end(files, tmp_path):
    file = Path(shutil.copy(files.json, tmp_path))
    assert Tokenizer(file).end_ids == {301}
    # The Instruct models' files: the tokenizer's end, config.json's, and those of generation_config.json.
    for name, content, ends in [
        ("tokenizer_config.json", {"eos_token": "<|reserved_special_token_0|>"}, {301, 302}),
        ("config.json", {"eos_token_id": 303}, {301, 302, 303}),
        ("generation_config.json", {"eos_token_id": [301, 309, 300, 7]}, {301, 302, 303, 309}),  # neither BOS nor text
    ]:
        (tmp_path / name).write_text(json.dumps(content))
        assert Tokenizer(file).end_ids == ends
    assert Tokenizer(file).eos_id == 302
    assert Tokenizer(files.json, str(tmp_path)).end_ids == {301, 303, 309}  # a tokenizer that lies elsewhere
    assert Tokenizer(files.model).end_ids == {301, 308, 309}  # as Meta's code has it
    # Added to SentencePiece's, beyond its pieces.
    sp = Path(shutil.copy(TINY, tmp_path))
    added = {"2048": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "added_tokens_decoder": added})
    )
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "generation_config.json").unlink()
    assert (Tokenizer(sp).eos_id, Tokenizer(sp).end_ids) == (2, {2, 2048})
    assert Tokenizer(sp).describe_ends() == (
        "texts begin with <s> (1), end with </s> (2), <|im_end|> (2048); config.json says 1"
    )


@pytest.mark.parametrize(
    ("in_config", "in_generation", "files"),
    [
        (2, [2, 0], "; config.json says 2; generation_config.json says 2, 0"),
        ([0, 2], [2, 0], ""),
        (None, [2, 0], ""),
        (0, None, "; config.json says 0"),  # where answers that are trained on do not end
    ],
)
def test_where_texts_end_is_said_with_the_files_that_disagree(tmp_path, in_config, in_generation, files):
    file = bpe(tmp_path / "smol", SMOL, None, eos_token=SMOL[2])
    file.with_name("config.json").write_text(json.dumps({"eos_token_id": in_config}))
    file.with_name("generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    assert Tokenizer(file).describe_ends() == (
        f"texts begin without BOS, end with <|im_end|> (2), <|endoftext|> (0){files}"
    )


@pytest.mark.parametrize(("special", "fits"), [(True, True), (False, False)])
def test_tokens_beyond_the_rows_of_a_model(files, tmp_path, special, fits):
    """[PAD], added for batches: no text can spell it, unless it is added as a word."""
    padded = tokenizers.Tokenizer.from_file(str(files.json))
    (padded.add_special_tokens if special else padded.add_tokens)(["[PAD]"])
    padded.save(str(file := tmp_path / "tokenizer.json"))
    model = ModelConfig(name="mine", vocab_size=556)
    if fits:
        check_vocabulary(Tokenizer(file), file, model, None)
        return
    for checkpoint, advice in (
        (None, "give the tokenizer"),
        (str(tmp_path), "texts can contain token ids up to 556, and each"),
    ):
        with pytest.raises(UserError, match=f"has 557 pieces, but model=mine has a vocabulary of 556: {advice}"):
            check_vocabulary(Tokenizer(file), file, model, checkpoint)


def test_a_model_may_be_padded_to_a_round_number_of_rows(files):
    tokenizer = Tokenizer(files.json)  # of 556 pieces
    for rows, fits in ((576, True), (1024, True), (560, False), (1088, False)):
        with nullcontext() if fits else pytest.raises(UserError, match="has 556 pieces, but model=mine has"):
            check_vocabulary(tokenizer, files.json, ModelConfig(name="mine", vocab_size=rows), None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"post_processor": None, "added_tokens": []}, "does not say which token ends a text"),
        ({"decoder": None}, "is neither byte-level BPE, like Llama 3's, nor has bytes like LLaMA-2's$"),
    ],
)
def test_json_of_another_kind(files, tmp_path, change, reason):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(files.json.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        Tokenizer(file)


@pytest.mark.parametrize("content", ['{"version": "1.0"}', '{"version": ', ' {"a": 1}'])
def test_json_of_something_else(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer=.* is not a SentencePiece model, nor a tokenizer\.json: "):
        Tokenizer(file)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda lines: lines[1:], "its ranks are not"),
        (lambda lines: [*lines, b"AAAA 7"], "its ranks are not"),
        (lambda lines: [b"AAAA 0", *lines[1:]], "lack a byte"),
        (lambda lines: [*lines[:-1], b"AAAA"], "one of its lines is not a token with its rank"),
        (lambda lines: [*lines[:-1], lines[-1] + b"x"], "one of its lines is not a token with its rank"),
    ],
)
def test_damaged_ranks(files, tmp_path, damage, reason):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(damage(files.model.read_bytes().splitlines())) + b"\n")
    with pytest.raises(UserError, match=f"tokenizer=.* is damaged: .*{reason}"):
        Tokenizer(file)
