"""Reads the tokenizer in a GGUF file as the content of a `tokenizer.json` or `tokenizer.model`."""

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from llama_ft.config import UserError, is_gguf
from llama_ft.config.checks import readable
from llama_ft.data.byte_level import RULES, SAME_RULES, tokenizer_json
from llama_ft.files import Json, explained
from llama_ft.gguf_file import read_header

KEYS = "tokenizer.ggml."


class TokenType(IntEnum):
    """Types of tokens, as in SentencePiece's models."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class GgufTokenizer:
    """The tokenizer settings in a file, of any kind; a UserError if they are damaged."""

    def __init__(self, path: Path) -> None:
        metadata = read_header(path).metadata
        self.path, self.chat_template = path, metadata.get("tokenizer.chat_template")
        self.values = {key.removeprefix(KEYS): metadata[key] for key in metadata if key.startswith(KEYS)}
        self.kind = self.values.get("model")
        with readable(path):
            self.tokens: list[str] = self.values.get("tokens") or []
            kinds = self.values.get("token_type") or [TokenType.NORMAL] * len(self.tokens)
            self.tokens_and_types = list(zip(self.tokens, map(TokenType, kinds), strict=True))
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
        defaults = {"unk": 0, "bos": 1, "eos": 2} if self.kind == "llama" else {}  # as in llama.cpp
        ids: Any = {name: self.values.get(f"{key}_token_id", defaults.get(name)) for name, key in names.items()}
        self.ids: dict[str, int] = {name: ids[name] for name in ids if ids[name] in range(len(self.tokens))}
        self.rule_name = SAME_RULES.get(pre := str(self.values.get("pre")), pre)
        default = self.kind == "llama" or (self.rule_name in RULES and RULES[self.rule_name].adds_bos)
        self.adds_bos = bool(self.values.get("add_bos_token", default))

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text."""
        return [self.ids[name] for name in ("eos", "eot", "eom") if name in self.ids]

    def refused(self, problem: str) -> UserError:
        """The error for a problem, with advice."""
        return UserError(f"tokenizer={self.path}: {problem}; give tokenizer=FILE, the model's tokenizer.json or .model")


def sentencepiece_model(content: bytes) -> Any:
    """Parse a SentencePiece file into its `ModelProto`."""
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2
    return schema.ModelProto.FromString(content)


def read_tokenizer(file: Path) -> bytes:
    """The content of a tokenizer's file; a GGUF file is converted to a tokenizer.json or a SentencePiece model."""
    if not is_gguf(file):
        with explained(f"tokenizer={file} cannot be read"):
            return file.read_bytes()
    gguf = GgufTokenizer(file)
    if gguf.kind not in ("llama", "gpt2"):
        problem = f"its tokenizer is of type {gguf.kind}, but only gpt2 and llama are supported"
        raise gguf.refused(problem if gguf.kind else "it has no tokenizer")
    with readable(file):
        return _sentencepiece(gguf) if gguf.kind == "llama" else json.dumps(_byte_level(gguf)).encode()


def tokenizer_settings(path: Path) -> dict[str, Json]:
    """The contents, by name, of the Hugging Face files that would be next to this tokenizer."""
    gguf = GgufTokenizer(path)
    names = [name for name in ("bos", "eos", "unk", "pad") if name in gguf.ids]
    config: Json = {f"{name}_token": gguf.tokens[gguf.ids[name]] for name in names} | {"add_bos_token": gguf.adds_bos}
    return {
        "tokenizer_config.json": config | ({"chat_template": gguf.chat_template} if gguf.chat_template else {}),
        "generation_config.json": {"eos_token_id": gguf.ends},
    }


def _byte_level(gguf: GgufTokenizer) -> Json:
    if gguf.rule_name not in RULES:
        raise gguf.refused(f"it splits text by the rule {gguf.values.get('pre')}: supported are {', '.join(RULES)}")
    numbered = list(enumerate(gguf.tokens_and_types))
    vocabulary = {token: number for number, (token, kind) in numbered if kind is not TokenType.UNUSED}
    apart = (TokenType.CONTROL, TokenType.USER_DEFINED)
    added = {token: (number, kind is TokenType.CONTROL) for number, (token, kind) in numbered if kind in apart}
    bos = [gguf.ids["bos"]] if "bos" in gguf.ids else []
    added |= {gguf.tokens[number]: (number, True) for number in (*bos, *gguf.ends)}
    merges = [merge.split(" ", 1) for merge in gguf.values["merges"]]
    first = gguf.tokens[bos[0]] if gguf.adds_bos and bos else None
    return tokenizer_json(vocabulary, merges, added, RULES[gguf.rule_name], first)


def _sentencepiece(gguf: GgufTokenizer) -> bytes:
    if gguf.values.get("precompiled_charsmap"):
        raise gguf.refused("it normalizes characters before splitting text, unlike LLaMA's")
    model = sentencepiece_model(b"")
    special = {"bos": TokenType.CONTROL, "eos": TokenType.CONTROL, "unk": TokenType.UNKNOWN}
    types = {gguf.ids[name]: special[name] for name in special}
    for number, ((piece, kind), score) in enumerate(zip(gguf.tokens_and_types, gguf.values["scores"], strict=True)):
        model.pieces.add(piece=piece, score=score, type=types.get(number, kind))
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.pad_id = trainer.BPE, len(gguf.tokens), -1
    trainer.byte_fallback = any(kind is TokenType.BYTE for _, kind in gguf.tokens_and_types)
    for name in special:
        setattr(trainer, f"{name}_id", gguf.ids[name])
        setattr(trainer, f"{name}_piece", gguf.tokens[gguf.ids[name]])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(gguf.values.get("add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())
