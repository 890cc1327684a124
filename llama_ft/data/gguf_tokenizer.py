"""The tokenizer in a GGUF file, in the forms that tokenizers have elsewhere: `tokenizer.json` or `tokenizer.model`."""

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from llama_ft.config import UserError
from llama_ft.data.byte_level import RULES, SAME_RULES, tokenizer_json
from llama_ft.files import Json
from llama_ft.gguf_file import read_header

KEYS = "tokenizer.ggml."


class TokenType(IntEnum):
    """What a token is, as in SentencePiece's models."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Said(dict[str, Any]):
    """What a file says of its tokenizer, by keys without their beginning; a UserError if it has none."""

    def __init__(self, path: Path) -> None:
        metadata = read_header(path).metadata
        super().__init__((key.removeprefix(KEYS), metadata[key]) for key in metadata if key.startswith(KEYS))
        self.path = path
        kind, self.tokens, n_types = self.get("model"), self.get("tokens") or [], len(self.get("token_type") or [])
        if kind not in ("llama", "gpt2") or not self.tokens or n_types != len(self.tokens):
            problem = f"its tokenizer is of type {kind}, and only gpt2 and llama are read" if kind else "it has none"
            raise self.refused(problem if kind not in ("llama", "gpt2") else "its tokens are damaged")
        self.types = [TokenType(number) if 1 <= number <= 6 else TokenType.NORMAL for number in self["token_type"]]
        self.ids = {"bos": self._id("bos"), "eos": self._id("eos"), "unk": self._id("unknown"), "pad": self._id("padding")}
        if kind == "llama":  # llama.cpp's defaults
            self.ids |= {name: number for name, number in (("unk", 0), ("bos", 1), ("eos", 2)) if self.ids[name] is None}
        self.rule_name = SAME_RULES.get(pre := str(self.get("pre")), pre)
        default = kind == "llama" or (self.rule_name in RULES and RULES[self.rule_name].adds_bos)
        self.adds_bos = bool(self.get("add_bos_token", default))
        self.ends = [number for name in ("eot", "eom") if (number := self._id(name)) is not None]

    def _id(self, name: str) -> int | None:
        number = self.get(f"{name}_token_id")
        return number if isinstance(number, int) and 0 <= number < len(self.tokens) else None

    def refused(self, problem: str) -> UserError:
        """An error that says what to do about a problem."""
        return UserError(f"tokenizer={self.path}: {problem}; give tokenizer=FILE, the model's tokenizer.json or .model")


def tokenizer_content(path: Path) -> bytes:
    """The content of a tokenizer.json, or of a SentencePiece model; a UserError if the tokenizer is of another kind."""
    said = Said(path)
    return _sentencepiece(said) if said["model"] == "llama" else json.dumps(_byte_level(said)).encode()


def tokenizer_settings(path: Path) -> dict[str, Json]:
    """What the files of Hugging Face's that lie around a tokenizer would hold, by their names."""
    said = Said(path)
    names: Json = {f"{name}_token": said.tokens[number] for name, number in said.ids.items() if number is not None}
    if template := read_header(path).metadata.get("tokenizer.chat_template"):
        names["chat_template"] = template
    ends = [said.ids["eos"], *said.ends]
    return {
        "tokenizer_config.json": names | {"add_bos_token": said.adds_bos},
        "generation_config.json": {"eos_token_id": [end for end in ends if end is not None]},
    }


def _byte_level(said: Said) -> Json:
    if said.rule_name not in RULES:
        known = ", ".join(RULES)
        raise said.refused(f"it splits text by the rule {said.get('pre')}, and only {known} are known")
    numbered = list(zip(said.tokens, said.types, strict=True))
    vocabulary = {token: number for number, (token, kind) in enumerate(numbered) if kind is not TokenType.UNUSED}
    apart = (TokenType.CONTROL, TokenType.USER_DEFINED)
    added = {token: (vocabulary[token], kind is TokenType.CONTROL) for token, kind in numbered if kind in apart}
    begin_or_end = [said.ids["bos"], said.ids["eos"], *said.ends]
    added |= {said.tokens[number]: (number, True) for number in begin_or_end if number is not None}
    merges = [merge.split(" ", 1) for merge in said.get("merges", [])]
    bos = said.tokens[said.ids["bos"]] if said.adds_bos and said.ids["bos"] is not None else None
    return tokenizer_json(vocabulary, merges, added, RULES[said.rule_name], bos)


def _sentencepiece(said: Said) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2
    scores, ids = said.get("scores") or [], said.ids
    if len(scores) != len(said.tokens) or said.get("precompiled_charsmap"):
        raise said.refused("its pieces have no scores, or it changes characters first, as LLaMA's does not")
    model = schema.ModelProto()
    special = {ids["bos"]: TokenType.CONTROL, ids["eos"]: TokenType.CONTROL, ids["unk"]: TokenType.UNKNOWN}
    for number, (piece, score, kind) in enumerate(zip(said.tokens, scores, said.types, strict=True)):
        model.pieces.add(piece=piece, score=score, type=special.get(number, kind))
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(said.tokens)
    trainer.byte_fallback = TokenType.BYTE in said.types
    for name in ("bos", "eos", "unk"):
        setattr(trainer, f"{name}_id", ids[name])
        setattr(trainer, f"{name}_piece", said.tokens[ids[name]])
    trainer.pad_id = -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(said.get("add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = bool(said.get("remove_extra_whitespaces", False))
    return bytes(model.SerializeToString())
