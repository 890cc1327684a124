"""A tokenizer in the form that Hugging Face's libraries read: `tokenizer.json`, and the names of its special tokens.

They can make one from `tokenizer.model` by themselves, but what they make splits text otherwise: of LLaMA-2's they drop
a leading space, of Llama 3's they do not know how text is split before pairs are merged.
"""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from llama_ft.config import UserError
from llama_ft.data.tiktoken_file import Tiktoken
from llama_ft.files import Json

Special = list[tuple[str, int]]  # names and ids of special tokens: BOS, EOS, and then any others
FAST_TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
SPACE = "▁"  # stands for a space in SentencePiece's pieces
# Llama 3's special tokens by index; the others are reserved.
LLAMA_3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
LLAMA_3_1_NAMES = LLAMA_3_NAMES | {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}


def tokenizer_files(file: Path, llama_3_1: bool) -> dict[str, Json]:
    """The contents of tokenizer.json and tokenizer_config.json for a `tokenizer.model`, LLaMA-2's or Llama 3's.

    With `llama_3_1`, special tokens have the names that they have since. A file that splits text in a way that
    tokenizer.json cannot express is a UserError.
    """
    is_ranks = Tiktoken.LINE.match(file.read_bytes())
    special, parts = _from_ranks(file, llama_3_1) if is_ranks else _from_sentencepiece(file)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": name, **flags} for name, number in sorted(special, key=lambda token: token[1])]
    (bos, bos_id), (eos, _), *_ = special
    single, second = (  # BOS before every text, as LLaMA has it
        [{"SpecialToken": {"id": bos, "type_id": index}}, {"Sequence": {"id": text, "type_id": index}}]
        for index, text in enumerate("AB")
    )
    tokens = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": tokens}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}
    content["post_processor"] = template
    return {"tokenizer.json": content, "tokenizer_config.json": FAST_TOKENIZER | {"bos_token": bos, "eos_token": eos}}


def _from_sentencepiece(file: Path) -> tuple[Special, Json]:
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2
    model = schema.ModelProto()
    model.ParseFromString(file.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    plain = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    plain = plain and all(piece.type not in (piece.USER_DEFINED, piece.UNUSED) for piece in model.pieces)
    if trainer.model_type != trainer.BPE or not (plain and normalizer.add_dummy_prefix and trainer.byte_fallback):
        raise UserError(f"tokenizer={file} is not like LLaMA-2's: no tokenizer.json can be made of it")
    pieces = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: -piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    special = [(model.pieces[number].piece, number) for number in (trainer.bos_id, trainer.eos_id, trainer.unk_id)]
    normalizers = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return special, {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(pieces, scores, unknown=special[2][0]),
    }


def _from_ranks(file: Path, llama_3_1: bool) -> tuple[Special, Json]:
    ranks = Tiktoken.ranks(file)
    names = LLAMA_3_1_NAMES if llama_3_1 else LLAMA_3_NAMES
    reserved = (f"<|reserved_special_token_{number}|>" for number in count())
    special = [(names.get(index) or next(reserved), len(ranks) + index) for index in range(Tiktoken.N_SPECIAL)]
    # Each byte is a letter in byte-level vocabularies: itself where it can be seen.
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = count(256)
    letters = [chr(value if value in visible else next(others)) for value in range(256)]
    vocabulary = {"".join(letters[value] for value in token): rank for token, rank in ranks.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": Tiktoken.PATTERN}, "behavior": "Isolated", "invert": False}
    return special, {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": _bpe(vocabulary, vocabulary, unknown=None),
    }


def _bpe(vocabulary: Mapping[str, int], rank_of: Mapping[str, float], unknown: str | None) -> Json:
    """The model. Where it has a piece for the unknown, that is SentencePiece's, which spells the rest in bytes."""
    is_sentencepiece = unknown is not None
    # Every pair of pieces that make up a piece, in the order of merging: the lowest rank of the whole comes first.
    pairs = [
        (rank_of[piece], rank_of[piece[:cut]], rank_of[piece[cut:]], piece[:cut], piece[cut:])
        for piece in rank_of
        for cut in range(1, len(piece))
        if piece[:cut] in rank_of and piece[cut:] in rank_of
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": is_sentencepiece,
        "byte_fallback": is_sentencepiece,
        "ignore_merges": not is_sentencepiece,  # Llama 3: a word that is a token is that token
        "vocab": dict(vocabulary),
        "merges": [[left, right] for *_, left, right in sorted(pairs)],
    }
