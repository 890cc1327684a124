"""A tokenizer as the metadata of a GGUF file."""

import json
import re
from typing import Any

from llama_ft.config import UserError
from llama_ft.data.byte_level import rule_name
from llama_ft.data.gguf_tokenizer import TokenType, read_tokenizer, sentencepiece_model
from llama_ft.data.tiktoken_file import Tiktoken
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.data.tokenizer_json import tokenizer_files
from llama_ft.files import Json

ADDED_SCORE = -1000.0  # of tokens that SentencePiece's model lacks, as in llama.cpp's own converter
Tokens = dict[int, tuple[str, TokenType, float]]  # by id: the text, its type, and SentencePiece's score


def gguf_tokenizer(tokenizer: Tokenizer, n_rows: int, llama_3_1: bool) -> Json:
    """The metadata, without `tokenizer.` before each key; a UserError if GGUF cannot express how text is split.

    As llama.cpp requires, it has one token for each row of the embedding.
    """
    content, named = read_tokenizer(tokenizer.file), tokenizer.named
    if tokenizer.is_json:
        tokens, metadata = _from_json(tokenizer, json.loads(content))
    elif Tiktoken.LINE.match(content):
        tokens, metadata = _from_json(tokenizer, tokenizer_files(tokenizer.file, llama_3_1)["tokenizer.json"])
    else:
        tokens, metadata = _from_sentencepiece(tokenizer, sentencepiece_model(content))
    begin_or_end = {tokenizer.bos_id, *tokenizer.end_ids}
    tokens |= {i: (text, TokenType.CONTROL, score) for i, (text, _, score) in tokens.items() if i in begin_or_end}
    rows = [tokens.get(number, (f"[PAD{number}]", TokenType.UNUSED, ADDED_SCORE)) for number in range(n_rows)]
    ids = {text: number for number, (text, *_) in enumerate(rows)}
    texts, kinds, scores = zip(*rows, strict=True)
    metadata |= {"ggml.tokens": list(texts), "ggml.token_type": [int(kind) for kind in kinds]}
    metadata |= {"ggml.scores": list(scores)} if metadata["ggml.model"] == "llama" else {}
    bos_id = ids.get(named.names.get("bos_token", "")) if tokenizer.bos_id is None else tokenizer.bos_id
    others = sorted(tokenizer.end_ids - {tokenizer.eos_id}, key=lambda end: "eom" in texts[end])
    numbers = {"bos": bos_id, "eos": tokenizer.eos_id} | dict(zip(("eot", "eom"), others, strict=False))
    metadata |= {f"ggml.{name}_token_id": number for name, number in numbers.items() if number is not None}
    metadata["ggml.add_bos_token"] = tokenizer.bos_id is not None
    return metadata | ({"chat_template": named.chat_template} if named.chat_template else {})


def _from_json(tokenizer: Tokenizer, parts: Json) -> tuple[Tokens, Json]:
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in parts["model"]["merges"]]
    tokens: Tokens = {number: (text, TokenType.NORMAL, 0.0) for text, number in parts["model"]["vocab"].items()}
    unknown, metadata = parts["model"].get("unk_token"), dict[str, Any]()
    if rule := rule_name(parts):
        metadata = {"ggml.model": "gpt2", "ggml.pre": rule, "ggml.merges": [" ".join(merge) for merge in merges]}
    elif (adds_space := _adds_space(parts)) is not None:
        # Merges are in the order of SentencePiece's scores.
        scores = {"".join(merge): -float(rank) for rank, merge in reversed([*enumerate(merges)])}
        for number, (text, _, _) in tokens.items():
            kind = TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else TokenType.NORMAL
            tokens[number] = (text, kind, scores.get(text, -float(len(merges))))
        metadata = {"ggml.model": "llama", "ggml.pre": "default", "ggml.add_space_prefix": adds_space}
        metadata |= {"ggml.unknown_token_id": parts["model"]["vocab"][unknown]} if unknown else {}
    else:
        problem = "splits text by a rule that has no name in GGUF, or that is not known here"
        raise UserError(f"tokenizer={tokenizer.file} {problem}: to=hf writes it unchanged")
    for token in parts["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        tokens[token["id"]] = (token["content"], TokenType.UNKNOWN if token["content"] == unknown else kind, 0.0)
    return tokens, metadata


def _adds_space(parts: Json) -> bool | None:
    """Return True if a BPE of LLaMA-2's kind puts a space before a text; None for another kind."""
    normalizer, splits = parts.get("normalizer") or {}, parts.get("pre_tokenizer") or {}
    kinds = [str(step["type"]) for step in normalizer.get("normalizers", [normalizer]) if step]
    if not parts["model"].get("byte_fallback"):
        return None
    if not splits and kinds in (["Prepend", "Replace"], ["Replace"]):
        return kinds[0] == "Prepend"
    is_metaspace = splits.get("type") == "Metaspace" and not kinds
    return bool(splits.get("prepend_scheme") != "never") if is_metaspace else None


def _from_sentencepiece(tokenizer: Tokenizer, model: Any) -> tuple[Tokens, Json]:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    changes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    if trainer.model_type != trainer.BPE or changes:
        raise UserError(f"tokenizer={tokenizer.file} is not like LLaMA-2's: a GGUF file for LLaMA cannot hold it")
    added = {number: (name, TokenType.CONTROL, ADDED_SCORE) for name, number in tokenizer.named.added.items()}
    pieces = {i: (piece.piece, TokenType(piece.type), piece.score) for i, piece in enumerate(model.pieces)}
    metadata = {"ggml.model": "llama", "ggml.pre": "default", "ggml.add_space_prefix": normalizer.add_dummy_prefix}
    return added | pieces, metadata | {"ggml.unknown_token_id": trainer.unk_id}
