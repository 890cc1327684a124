"""LLaMA's tokenizers, all byte-pair encodings.

LLaMA-2's is a SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226), `tokenizer.model`. Llama 3's is a list
of ranks, also `tokenizer.model`, from Meta, and `tokenizer.json` from Hugging Face, the format of most other models.
A GGUF file holds either kind.
"""

import math
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece

from llama_ft.config import ModelConfig, ModelSource, UserError, path_of
from llama_ft.data.gguf_tokenizer import read_tokenizer
from llama_ft.data.special_tokens import TOKENIZER_CONFIG, Offsets, SpecialTokens, home_of, named_tokens
from llama_ft.data.tiktoken_file import Tiktoken, missing_package
from llama_ft.files import LFS_HINT, LFS_POINTER
from llama_ft.system import Log, silent

# A model may have more rows than its tokenizer has pieces, to round their number: Qwen 2.5 has 399 more.
MAX_PADDING, ROUND = 511, 64
JSON_START = re.compile(rb'\s*\{\s*"')  # of a tokenizer.json, whatever its name


class Tokenizer:
    """Text to token ids and back, whatever the format of the file."""

    def __init__(self, file: Path, checkpoint: str | None = None) -> None:
        """Load a file, whose content tells its format; a UserError if that fails. The checkpoint may name ends."""
        if not file.is_file():
            is_folder = "is a folder: give the tokenizer.model or tokenizer.json in it"
            raise UserError(f"tokenizer={file}: {is_folder if file.is_dir() else 'there is no such file'}")
        self.file, content = file, read_tokenizer(file)
        if content.startswith(LFS_POINTER):
            raise UserError(f"tokenizer={file} {LFS_HINT}")
        self.is_json, self.named = JSON_START.match(content) is not None, named_tokens(file, checkpoint)
        kind = _HuggingFace if self.is_json else Tiktoken if Tiktoken.LINE.match(content) else _SentencePiece
        self._format = kind(file, content, self.named)
        self.vocab_size: int = self._format.vocab_size
        self.bos_id: int | None = self._format.bos_id  # None if texts begin without BOS
        self.eos_id: int = self._format.eos_id  # ends the answers that are trained on
        if self.bos_id == -1 or self.eos_id == -1:
            raise UserError(f"tokenizer={file} has no BOS or no EOS piece, but LLaMA needs both")
        # Tokens that end a generated text. BOS does not, whatever an old config.json says.
        self.end_ids = frozenset({*self._format.ends} - {self.bos_id} | {self.eos_id})
        self.special: dict[str, int] = self._format.special  # tokens by name
        ids, names = {"bos_token": self.bos_id, "eos_token": self.eos_id}, {n: name for name, n in self.special.items()}
        known = {key: names[number] for key, number in ids.items() if number in names}
        self.special_names = known | dict(self.named.names)  # their names in chat templates
        # The number of rows that a model needs; special tokens that no text can spell may be beyond it.
        self.n_used = 1 + max(self._format.last_spelled, self.eos_id, self.bos_id or 0)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of the text, optionally between BOS and EOS. Text never spells a special token."""
        before = [self.bos_id] if bos and self.bos_id is not None else []
        return before + self._format.encode(text) + [self.eos_id] * eos

    def encode_chat(self, text: str) -> tuple[list[int], Offsets]:
        """Token ids of a chat template's output, which spells special tokens, and each token's characters."""
        return self._format.encode_chat(text)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, without special tokens. SentencePiece drops the space that it adds to the first word."""
        return self._format.decode([token for token in ids if token < self.vocab_size])  # a padded model has more

    def describe_ends(self) -> str:
        """One line for the log: the tokens at which texts begin and end, the trained end first; files that disagree."""
        names = {number: f"{name} ({number})" for name, number in self.special.items()}
        begin = "without BOS" if self.bos_id is None else f"with {names.get(self.bos_id, self.bos_id)}"
        ends = [str(names.get(end, end)) for end in (self.eos_id, *sorted(self.end_ids - {self.eos_id}))]
        agree = all(self.eos_id in ids and {*ids} == {*self.named.named_ends[0][1]} for _, ids in self.named.named_ends)
        files = () if agree else (f"; {name} says {', '.join(map(str, ids))}" for name, ids in self.named.named_ends)
        return f"texts begin {begin}, end with {', '.join(ends)}{''.join(files)}"


def load_tokenizer(source: ModelSource, log: Log = silent) -> Tokenizer:
    """Load a model's tokenizer; a UserError if it is missing, damaged, or another model's. Logs its end tokens."""
    tokenizer = Tokenizer(source.tokenizer_file, source.checkpoint)
    check_vocabulary(tokenizer, source.tokenizer_file, source.model, source.checkpoint)
    if not source.model.is_builtin:
        log(f"tokenizer: {tokenizer.describe_ends()}")
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, file: Path, model: ModelConfig, checkpoint: str | None) -> None:
    """Raise a UserError unless a tokenizer is the model's.

    It may have somewhat fewer pieces than the model has rows, since some models are padded to a round number, and any
    number fewer if it is next to the checkpoint. It may have special tokens beyond the rows, such as an added [PAD].
    """
    is_near = checkpoint is not None and home_of(file).absolute() == path_of(checkpoint).absolute()
    padding = math.inf if is_near else MAX_PADDING if model.vocab_size % ROUND == 0 else 0
    if not tokenizer.n_used <= model.vocab_size <= tokenizer.vocab_size + padding:
        sizes = f"{tokenizer.vocab_size} pieces, but model={model.name} has a vocabulary of {model.vocab_size}"
        advice = "give the tokenizer that belongs to the model"
        if is_near:
            advice = f"texts can contain token ids up to {tokenizer.n_used - 1}, and each needs a row"
        raise UserError(f"tokenizer={file} has {sizes}: {advice}")


class _SentencePiece:
    """LLaMA-2's tokenizer, and the built-in one."""

    def __init__(self, file: Path, content: bytes, named: SpecialTokens) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer={file} is not a SentencePiece model") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        unknown = self._processor.unk_id()
        eos = named.names.get("eos_token", "")
        end = named.added.get(eos, self._processor.piece_to_id(eos))
        self.ends = [*named.ends, *{end} - {unknown}]
        spelled = (number for number in reversed(range(self.vocab_size)) if not self._processor.is_control(number))
        self.last_spelled = next(spelled, -1)
        control = filter(self._processor.is_control, range(self.vocab_size))
        self.special = {self._processor.id_to_piece(number): number for number in control} | dict(named.added)

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def encode_chat(self, text: str) -> tuple[list[int], Offsets]:
        parts = re.split(f"({'|'.join(map(re.escape, self.special))})", text)
        ids, offsets, place = list[int](), Offsets(), 0
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self.special[part])
                offsets.append((place, place + len(part)))
            else:
                found: Any = self._processor.encode(part, out_type="offset_mapping")
                ids += found["ids"]
                # For a character of several byte tokens, only the last token has the character's offsets.
                offsets += [(place + first, place + max(end, first + 1)) for first, end in found["offsets"]]
            place += len(part)
        return ids, offsets

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))


class _HuggingFace:
    """A BPE in `tokenizer.json`: byte-level, as in Llama 3, or with byte fallback, as in LLaMA-2."""

    LLAMA_3_BOS, LLAMA_3_ENDS = "<|begin_of_text|>", ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
    LLAMA_2_END, BYTE = "</s>", re.compile("<0x([0-9A-F]{2})>")

    def __init__(self, file: Path, content: bytes, named: SpecialTokens) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise missing_package("tokenizers", file) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises nothing narrower
            raise UserError(f"tokenizer={file} is not a SentencePiece model, nor a tokenizer.json: {error}") from error
        self._has_bytes = getattr(self._tokenizer.model, "byte_fallback", False) and self._tokenizer.decoder is not None
        if not self._has_bytes and not isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel):
            raise UserError(f"tokenizer={file} is neither byte-level BPE, like Llama 3's, nor has bytes like LLaMA-2's")
        # The file's settings for batches do not apply here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # text that spells them stays text
        # As in transformers, tokens that begin or end texts are special even if the file does not say so.
        bos, eos = (named.names.get(key, "") for key in ("bos_token", "eos_token"))
        plain = {n: t.content for n, t in self._tokenizer.get_added_tokens_decoder().items() if not t.special}
        self._tokenizer.add_special_tokens([t for n, t in plain.items() if n in named.ends or t in (bos, eos)])
        added = self._tokenizer.get_added_tokens_decoder()
        special = self.special = {token.content: number for number, token in added.items() if token.special}
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.last_spelled = max((vocabulary[name] for name in vocabulary.keys() - special.keys()), default=-1)
        self.bos_id = special.get(self.LLAMA_3_BOS, self._put_first())
        if self.bos_id is None and named.adds_bos:
            self.bos_id = special.get(bos)
        # A text token does not end texts: config.json may have LlamaConfig's default, 2, whatever that is here.
        self.ends = [end for end in named.ends if end in added]
        self.ends += [special[name] for name in self.LLAMA_3_ENDS if name in special]
        self.eos_id = special.get(eos, next(iter(self.ends), special.get(self.LLAMA_2_END, -1)))
        if self.eos_id == -1:
            needed = f"{TOKENIZER_CONFIG} with its eos_token must be next to it"
            raise UserError(f"tokenizer={file} does not say which token ends a text: {needed}")

    def _put_first(self) -> int | None:
        """The token that the file's post-processor puts before a text, if any."""
        plain, whole = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        return None if whole[:1] == plain[:1] else int(whole[0])

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_chat(self, text: str) -> tuple[list[int], Offsets]:
        self._tokenizer.encode_special_tokens = False
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        self._tokenizer.encode_special_tokens = True
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: list[int]) -> str:
        if not self._has_bytes:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        tokens = [token for token in map(self._tokenizer.id_to_token, ids) if token and token not in self.special]
        return str(self._tokenizer.decoder.decode(self._with_bytes_decoded(tokens)))

    def _with_bytes_decoded(self, tokens: list[str]) -> list[str]:
        """Replace runs of byte tokens by their text, with U+FFFD for bytes that are not UTF-8, as SentencePiece does.

        The package's ByteFallback also loses valid characters next to a broken one.
        """
        texts: list[str] = []
        for is_bytes, run in groupby(tokens, lambda token: bool(self.BYTE.fullmatch(token))):
            if is_bytes:
                values = bytes(int(token[3:5], 16) for token in run)
                # Surrogates stand for single bytes that are not UTF-8.
                run = iter([re.sub("[\udc80-\udcff]", "\ufffd", values.decode(errors="surrogateescape"))])
            texts += run
        return texts
