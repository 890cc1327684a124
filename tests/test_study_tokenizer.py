"""The study of the tokenizer: its claims fail where the mechanism that they name is broken."""

from pathlib import Path
from typing import Any

import pytest
from helpers.studies import failed

from experiments import tokenizer as study
from experiments.shared import alpaca_samples, sample_records, tiny_tokenizer
from llama_ft.config import UserError
from llama_ft.data import collate as collation
from llama_ft.data.tokenizer import Tokenizer


def quirks() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    return study.text_quirks(tokenizer) | study.record_quirks(tokenizer, sample_records("train", 50))


def test_they_hold_of_llama_2s_own_tokenizer(quick: dict[str, Any], test_data: Path) -> None:
    options = study.TokenizerOptions(tokenizer=str(test_data / "llama2_tokenizer.model"))
    assert failed(study, study.measure(options, lambda line: None)) == []


def test_lengths_and_padding_are_those_counted_by_hand(quick: dict[str, Any]) -> None:
    found = quick["lengths"]
    assert (found["samples"], found["tokens"], found["median"], found["longest"]) == (200, 24200, 96, 405)
    assert collation.collate(alpaca_samples()).n_targets == found["trained"]
    assert set(found["padding"]) == {str(size) for size in study.BATCH_SIZES}
    assert found["padding"]["1"] == 0


def test_a_first_word_without_a_space_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    encode, space = Tokenizer.encode, tiny_tokenizer().encode(" ")[0]

    def unprefixed(self: Tokenizer, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        after = encode(self, f"\n{text}", eos=eos)[len(encode(self, "\n")) :]
        return [self.bos_id] * bos + [token for token in after if token != space]

    monkeypatch.setattr(Tokenizer, "encode", unprefixed)
    assert {0, 2} <= set(failed(study, quick, quirks=quirks()))


def test_a_decoder_that_keeps_the_first_space_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: " " + decode(self, ids))
    assert failed(study, quick, quirks=quirks()) == [0, 1, 3]


def test_text_that_spells_eos_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Tokenizer.encode

    def spelling(self: Tokenizer, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        return encode(self, text, bos=bos, eos=eos or "</s>" in text)

    monkeypatch.setattr(Tokenizer, "encode", spelling)
    assert failed(study, quick, quirks=quirks()) == [4]


def test_padding_to_the_longest_of_all_fails(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collation.Padding, "width", lambda self, longest: 404)
    assert failed(study, quick, lengths=study.lengths_of(alpaca_samples())) == [7]


def test_training_on_the_prompt_too_fails(quick: dict[str, Any]) -> None:
    samples = [sample.after(sample.tokens, 1) for sample in alpaca_samples()]
    assert failed(study, quick, lengths=study.lengths_of(samples)) == [8]


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer=.*nowhere: there is no such file"):
        study.measure(study.TokenizerOptions(tokenizer=str(tmp_path / "nowhere")), lambda line: None)
