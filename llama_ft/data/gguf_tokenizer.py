"""The tokenizer in a GGUF file, in the forms that tokenizers have elsewhere: `tokenizer.json` or `tokenizer.model`."""

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
    """What a token is, as in SentencePiece's models."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Said:
    """What a file says of its tokenizer, of whatever kind; a UserError if it is damaged."""

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
        defaults = {"unk": 0, "bos": 1, "eos": 2} if self.kind == "llama" else {}  # as llama.cpp has it
        said: Any = {name: self.values.get(f"{key}_token_id", defaults.get(name)) for name, key in names.items()}
        self.ids: dict[str, int] = {name: said[name] for name in said if said[name] in range(len(self.tokens))}
        self.rule_name = SAME_RULES.get(pre := str(self.values.get("pre")), pre)
        default = self.kind == "llama" or (self.rule_name in RULES and RULES[self.rule_name].adds_bos)
        self.adds_bos = bool(self.values.get("add_bos_token", default))

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text."""
        return [self.ids[name] for name in ("eos", "eot", "eom") if name in self.ids]

    def refused(self, problem: str) -> UserError:
        """An error that says what to do about a problem."""
        return UserError(f"tokenizer={self.path}: {problem}; give tokenizer=FILE, the model's tokenizer.json or .model")


def sentencepiece_model(content: bytes) -> Any:
    """What a file of SentencePiece's holds: its `ModelProto`."""
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2
    return schema.ModelProto.FromString(content)


def read_tokenizer(file: Path) -> bytes:
    """The content of a tokenizer's file; of a GGUF file, what a tokenizer.json or a SentencePiece model would hold."""
    if not is_gguf(file):
        with explained(f"tokenizer={file} cannot be read"):
            return file.read_bytes()
    said = Said(file)
    if said.kind not in ("llama", "gpt2"):
        problem = f"its tokenizer is of type {said.kind}, and only gpt2 and llama are read"
        raise said.refused(problem if said.kind else "there is no tokenizer in it")
    with readable(file):
        return _sentencepiece(said) if said.kind == "llama" else json.dumps(_byte_level(said)).encode()


def tokenizer_settings(path: Path) -> dict[str, Json]:
    """What the files of Hugging Face's that lie around a tokenizer would hold, by their names."""
    said = Said(path)
    names = [name for name in ("bos", "eos", "unk", "pad") if name in said.ids]
    config: Json = {f"{name}_token": said.tokens[said.ids[name]] for name in names} | {"add_bos_token": said.adds_bos}
    return {
        "tokenizer_config.json": config | ({"chat_template": said.chat_template} if said.chat_template else {}),
        "generation_config.json": {"eos_token_id": said.ends},
    }


def _byte_level(said: Said) -> Json:
    if said.rule_name not in RULES:
        raise said.refused(f"it splits text by the rule {said.values.get('pre')}: only {', '.join(RULES)} are known")
    numbered = list(enumerate(said.tokens_and_types))
    vocabulary = {token: number for number, (token, kind) in numbered if kind is not TokenType.UNUSED}
    apart = (TokenType.CONTROL, TokenType.USER_DEFINED)
    added = {token: (number, kind is TokenType.CONTROL) for number, (token, kind) in numbered if kind in apart}
    bos = [said.ids["bos"]] if "bos" in said.ids else []
    added |= {said.tokens[number]: (number, True) for number in (*bos, *said.ends)}
    merges = [merge.split(" ", 1) for merge in said.values["merges"]]
    first = said.tokens[bos[0]] if said.adds_bos and bos else None
    return tokenizer_json(vocabulary, merges, added, RULES[said.rule_name], first)


def _sentencepiece(said: Said) -> bytes:
    if said.values.get("precompiled_charsmap"):
        raise said.refused("it changes characters before it splits text, which LLaMA's does not")
    model = sentencepiece_model(b"")
    special = {"bos": TokenType.CONTROL, "eos": TokenType.CONTROL, "unk": TokenType.UNKNOWN}
    types = {said.ids[name]: special[name] for name in special}
    for number, ((piece, kind), score) in enumerate(zip(said.tokens_and_types, said.values["scores"], strict=True)):
        model.pieces.add(piece=piece, score=score, type=types.get(number, kind))
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.pad_id = trainer.BPE, len(said.tokens), -1
    trainer.byte_fallback = any(kind is TokenType.BYTE for _, kind in said.tokens_and_types)
    for name in special:
        setattr(trainer, f"{name}_id", said.ids[name])
        setattr(trainer, f"{name}_piece", said.tokens[said.ids[name]])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(said.values.get("add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())
