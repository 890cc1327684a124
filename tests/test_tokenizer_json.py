"""`tokenizer.json` made from `tokenizer.model`: what transformers makes of texts with it, against the file itself."""

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from conftest import CHECKOUT
from test_tokenizer_llama3 import TEXTS, files
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama_ft.config import UserError
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.data.tokenizer_json import tokenizer_files
from llama_ft.decoding.text import TextStream

__all__ = ["files"]  # a fixture
TINY = CHECKOUT / "llama_ft" / "model" / "tiny" / "tokenizer.model"
MORE = [" leading", "  two \n\n  lines\t", "▁ a", "trailing  ", "\x00\x01", "é 🙂 日本", "a" * 300, "1234567 + 89"]


def random_texts() -> list[str]:
    generator = random.Random(0)
    blocks = ((32, 127), (0x20, 0x3000), (0x1F300, 0x1F600), (9, 14), (32, 33))
    return ["".join(chr(generator.randrange(*generator.choice(blocks))) for _ in range(40)) for _ in range(200)]


def made(file: Path, folder: Path, llama_3_1: bool = False) -> PreTrainedTokenizerBase:
    """transformers' tokenizer, of what is made from a file."""
    for name, content in tokenizer_files(file, llama_3_1).items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join([*map(stream.push, ids), stream.flush()])


def assert_same(theirs: PreTrainedTokenizerBase, file: Path, texts: list[str]) -> None:
    """And what is made is read by us as the file itself, whatever the ids."""
    ours, read = Tokenizer(file), Tokenizer(Path(theirs.name_or_path) / "tokenizer.json")
    assert (read.bos_id, read.eos_id, read.vocab_size) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    generator = random.Random(0)
    for text in texts:
        ids = ours.encode(text)
        assert read.encode(text) == ids, text
        # With bytes that are no UTF-8 beside those that are; SentencePiece has a sign for the unknown, 0.
        broken = ids[:1] + [generator.choice([*ids, *range(3, 259)]) for _ in range(12)]
        for each in (ids, broken):
            assert read.decode(each) == ours.decode(each), each
            assert streamed(read, each) == streamed(ours, each), each
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    for text in texts:
        ids = ours.encode(text, bos=True)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text


def test_the_built_in_tokenizer(tmp_path):
    assert_same(made(TINY, tmp_path), TINY, TEXTS[:-1] + MORE + random_texts())


def test_llama_2s(tmp_path, test_data):
    file = test_data / "llama2_tokenizer.model"
    records = json.loads((test_data / "alpaca_data_200.json").read_text())
    texts = [f"{record['instruction']}\n{record['input']}\n{record['output']}" for record in records]
    assert_same(made(file, tmp_path), file, TEXTS[:-1] + MORE + random_texts() + texts)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": None, "pre_tokenizer": METASPACE},  # as Mistral's
        {  # as Yi's: no space is put first
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
        },
    ],
    ids=["mistral", "yi"],
)
def test_other_tokenizers_with_bytes_are_read_as_by_transformers(tmp_path, change):
    content = tokenizer_files(TINY, False)["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path / "tokenizer.json")
    assert ours.describe_ends() == "texts begin with <s> (1), end with </s> (2)"  # by its name, as nothing says it
    for text in TEXTS[:-1] + MORE + random_texts():
        ids = ours.encode(text, bos=True)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text


def test_llama_3s_of_meta(tmp_path, files):
    assert_same(made(files.model, tmp_path), files.model, TEXTS[:-1] + MORE + random_texts())


def test_special_tokens_have_their_published_names(tmp_path, files):
    """As in Meta's llama3 and llama-models repositories."""
    for newer, expected in (
        (False, {4: "reserved_special_token_2", 8: "reserved_special_token_4", 10: "reserved_special_token_5"}),
        (True, {4: "finetune_right_pad_id", 5: "reserved_special_token_2", 8: "eom_id", 10: "python_tag"}),
    ):
        tokenizer = made(files.model, tmp_path, newer)
        both = {0: "begin_of_text", 1: "end_of_text", 2: "reserved_special_token_0", 6: "start_header_id", 9: "eot_id"}
        names = [token.strip("<|>") for token in tokenizer.convert_ids_to_tokens(range(300, 556))]
        assert {place: names[place] for place in both | expected} == both | expected
        assert names[255] == f"reserved_special_token_{247 if newer else 250}"
        assert len(set(names)) == 256


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"a line of text, number {n}" for n in range(200)))
    settings = {"input": str(corpus), "vocab_size": 40, "minloglevel": 2}
    like = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 320}
    like |= {"remove_extra_whitespaces": False}
    symbols = {"user_defined_symbols": ["line"]}
    kinds = {"unigram": {"model_type": "unigram"}, "plain": {"model_type": "bpe"}, "symbols": like | symbols}
    for name, other in kinds.items():
        sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / name), **(settings | other))
        with pytest.raises(UserError, match="is not like LLaMA-2's: no tokenizer"):
            tokenizer_files(tmp_path / f"{name}.model", False)
    shutil.rmtree(tmp_path)
