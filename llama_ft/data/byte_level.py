"""Byte-level BPE (Radford et al. 2019), as used by Llama 3, as the content of a `tokenizer.json`.

Text is split by one of a few rules before pairs are merged. A GGUF file names the rule, `tokenizer.ggml.pre`
(llama.cpp's src/llama-vocab.cpp); a tokenizer.json spells it out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_ft.files import Json

Added = Mapping[str, tuple[int, bool]]  # tokens at which text is cut first: (id, is_special)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT_2 = BYTE_LEVEL | {"use_regex": True}  # ByteLevel's own regex is GPT-2's
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}".replace(r"[\r\n]*|", r"[\r\n/]*|")


def _split(pattern: str) -> tuple[Json, Json]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL


@dataclass(frozen=True)
class Rule:
    """A rule that splits text."""

    pre_tokenizers: tuple[Json, ...]
    normalizer: Json | None = None
    ignore_merges: bool = False  # a word that is a token is not built by merges
    adds_bos: bool = False  # texts begin with BOS, unless a GGUF file says otherwise


RULES = {
    "llama-bpe": Rule(_split(LLAMA_3), ignore_merges=True, adds_bos=True),
    "qwen2": Rule(_split(rf"{_WORDS}|\p{{N}}|{_REST}"), {"type": "NFC"}),
    "smollm": Rule(({"type": "Digits", "individual_digits": True}, GPT_2)),
    "gpt-2": Rule((GPT_2,)),
    "tekken": Rule(_split(_TEKKEN), ignore_merges=True, adds_bos=True),  # Mistral NeMo
}
SAME_RULES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def rule_name(content: Json) -> str | None:
    """The name of the rule in the content of a tokenizer.json; None if it is not known."""
    found = content.get("normalizer"), _plain(content.get("pre_tokenizer") or {})
    return next((name for name, rule in RULES.items() if found == (rule.normalizer, _plain(_sequence(rule)))), None)


def _sequence(rule: Rule) -> Json:
    return {"type": "Sequence", "pretokenizers": list(rule.pre_tokenizers)}


def _plain(part: Json) -> list[Json]:
    """A flat list of pre-tokenizers, without settings that have no effect on tokens."""
    if part.get("type") == "Sequence":
        return [plain for inner in part["pretokenizers"] for plain in _plain(inner)]
    defaults = {"use_regex": True} if part.get("type") == "ByteLevel" else {}
    return [{key: value for key, value in (defaults | part).items() if key != "trim_offsets"}]


def added_tokens(added: Added) -> list[Json]:
    """Added tokens as a tokenizer.json lists them, ordered by id."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    ordered = sorted(added.items(), key=lambda token: token[1])
    return [{"id": number, "content": name, **flags, "special": special} for name, (number, special) in ordered]


def bos_before(bos: str, bos_id: int) -> Json:
    """LLaMA's post-processor, which puts BOS before every text."""
    single, second = (
        [{"SpecialToken": {"id": bos, "type_id": index}}, {"Sequence": {"id": text, "type_id": index}}]
        for index, text in enumerate("AB")
    )
    tokens = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": tokens}


def tokenizer_json(
    vocabulary: Mapping[str, int], merges: Sequence[Any], added: Added, rule: Rule, bos: str | None
) -> Json:
    """The content of a tokenizer.json.

    `vocabulary` has a letter for each byte, `merges` are in the order of merging, `bos`, if any, precedes every text;
    `added` tokens are in the vocabulary already, or follow it.
    """
    return {
        "version": "1.0",
        "added_tokens": added_tokens(added),
        "normalizer": rule.normalizer,
        "pre_tokenizer": _sequence(rule),
        "post_processor": bos_before(bos, added[bos][0]) if bos else None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "ignore_merges": rule.ignore_merges, "vocab": vocabulary, "merges": merges},
    }
