"""Converts a tokenizer to Hugging Face's form: `tokenizer.json`, and the names of its special tokens.

Their libraries can convert a `tokenizer.model` too, but the result splits text differently: for LLaMA-2's they drop a
leading space, for Llama 3's they do not know how text is split before pairs are merged.
"""

from collections.abc import Mapping
from itertools import count
from pathlib import Path

from llama_ft.config import UserError
from llama_ft.data.byte_level import RULES, added_tokens, bos_before, tokenizer_json
from llama_ft.data.gguf_tokenizer import read_tokenizer, sentencepiece_model
from llama_ft.data.tiktoken_file import Tiktoken
from llama_ft.files import Json

Special = list[tuple[str, int]]  # names and ids of special tokens: BOS, EOS, then others
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

    `llama_3_1` gives special tokens Llama 3.1's names. A file that splits text in a way that tokenizer.json cannot
    express is a UserError.
    """
    content = read_tokenizer(file)
    if Tiktoken.LINE.match(content):
        special, made = _from_ranks(Tiktoken.ranks(file, content), llama_3_1)
    else:
        special, made = _from_sentencepiece(file, content)
    (bos, _), (eos, _), *_ = special
    return {"tokenizer.json": made, "tokenizer_config.json": FAST_TOKENIZER | {"bos_token": bos, "eos_token": eos}}


def _from_sentencepiece(file: Path, content: bytes) -> tuple[Special, Json]:
    model = sentencepiece_model(content)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    plain = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    plain = plain and all(piece.type not in (piece.USER_DEFINED, piece.UNUSED) for piece in model.pieces)
    if trainer.model_type != trainer.BPE or not (plain and normalizer.add_dummy_prefix and trainer.byte_fallback):
        raise UserError(f"tokenizer={file} is not like LLaMA-2's: no tokenizer.json can be made from it")
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
        "version": "1.0",
        "added_tokens": added_tokens({name: (number, True) for name, number in special}),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "post_processor": bos_before(*special[0]),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": special[2][0],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": pieces,
            "merges": _merges(scores),
        },
    }


def _from_ranks(ranks: dict[bytes, int], llama_3_1: bool) -> tuple[Special, Json]:
    names = LLAMA_3_1_NAMES if llama_3_1 else LLAMA_3_NAMES
    reserved = (f"<|reserved_special_token_{number}|>" for number in count())
    special = [(names.get(index) or next(reserved), len(ranks) + index) for index in range(Tiktoken.N_SPECIAL)]
    # Byte-level vocabularies write each byte as a letter: itself if it is visible.
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = count(256)
    letters = [chr(value if value in visible else next(others)) for value in range(256)]
    vocabulary = {"".join(letters[value] for value in token): rank for token, rank in ranks.items()}
    added = {name: (number, True) for name, number in special}
    return special, tokenizer_json(vocabulary, _merges(vocabulary), added, RULES["llama-bpe"], special[0][0])


def _merges(rank_of: Mapping[str, float]) -> list[list[str]]:
    """Every pair of pieces that make up a piece, in the order of merging: by the rank of the whole."""
    pairs = [
        (rank_of[piece], rank_of[piece[:cut]], rank_of[piece[cut:]], piece[:cut], piece[cut:])
        for piece in rank_of
        for cut in range(1, len(piece))
        if piece[:cut] in rank_of and piece[cut:] in rank_of
    ]
    return [[left, right] for *_, left, right in sorted(pairs)]
