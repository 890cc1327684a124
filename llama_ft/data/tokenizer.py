"""LLaMA's tokenizers, all of them byte-pair encodings.

LLaMA-2's is a SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226), `tokenizer.model`. Llama 3's is a list
of ranks, also `tokenizer.model`, from Meta, and `tokenizer.json` from Hugging Face.
"""

import base64
import os
import re
from pathlib import Path

import sentencepiece

from llama_ft.config import ModelConfig, UserError

JSON_START = re.compile(rb'\s*\{\s*"')  # of a tokenizer.json, whatever its name


class Tokenizer:
    """Text to token ids and back, whatever the format of the file."""

    def __init__(self, file: Path) -> None:
        """Load a file, whose content says its format; a UserError if it or the package that reads it is missing."""
        if not file.is_file():
            what = "is a folder: give the tokenizer.model in it" if file.is_dir() else "there is no such file"
            raise UserError(f"tokenizer={file}: {what}")
        try:
            with file.open("rb") as stream:
                start = stream.read(1024)
        except OSError as error:
            raise UserError(f"tokenizer={file} cannot be read: {error.strerror}") from error
        self._format: _HuggingFace | Tiktoken | _SentencePiece
        if JSON_START.match(start):
            self._format = _HuggingFace(file)
        else:
            self._format = Tiktoken(file) if Tiktoken.LINE.match(start) else _SentencePiece(file)
        self.vocab_size: int = self._format.vocab_size
        self.bos_id: int = self._format.bos_id
        self.eos_id: int = self._format.eos_id
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"tokenizer={file} has no BOS or no EOS piece, which LLaMA needs")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of the text, with BOS before and EOS after it where asked for. Text never spells such a token."""
        return [self.bos_id] * bos + self._format.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens left out. SentencePiece drops the space it put before a first word."""
        return self._format.decode([token for token in ids if token < self.vocab_size])  # a padded model has more


def check_vocabulary(tokenizer: Tokenizer, file: Path, model: ModelConfig, checkpoint: str | None) -> None:
    """Raise a UserError unless a tokenizer is the model's.

    One that lies beside the checkpoint may have fewer pieces: some models are padded to a round number.
    """
    beside = checkpoint is not None and file.absolute().parent == Path(os.path.expanduser(checkpoint)).absolute()
    padded = beside and tokenizer.vocab_size < model.vocab_size
    if tokenizer.vocab_size != model.vocab_size and not padded:
        sizes = f"{tokenizer.vocab_size} pieces, but model={model.name} has a vocabulary of {model.vocab_size}"
        raise UserError(f"tokenizer={file} has {sizes}: give the tokenizer that belongs to the model")


class _SentencePiece:
    """LLaMA-2's, and the built-in one."""

    def __init__(self, file: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer={file} is not a SentencePiece model") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))


class _HuggingFace:
    """Llama 3's `tokenizer.json`. LLaMA-2's splits spaces otherwise than the SentencePiece model, so it is refused."""

    BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

    def __init__(self, file: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise _missing("tokenizers", file) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            raise UserError(f"tokenizer={file} is not a SentencePiece model, nor a tokenizer.json: {error}") from error
        # What a file says of the batches of its maker is not ours.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # where text spells them, as text
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        if not {self.BOS, self.EOS} <= special.keys():
            missing = f"it has no {self.BOS} or no {self.EOS}"
            raise UserError(f"tokenizer={file} is not Llama 3's: {missing}; of LLaMA-2 give tokenizer.model")
        self.bos_id, self.eos_id = special[self.BOS], special[self.EOS]

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class Tiktoken:
    """Llama 3's `tokenizer.model`: the base tokens with their ranks, which are their ids; 256 special ones follow."""

    # How text is split before pairs are merged, and how many special tokens there are, stand in the code of
    # https://github.com/meta-llama/llama3, llama/tokenizer.py, alone. BOS is the first special token, EOS the second.
    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    N_SPECIAL = 256
    LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

    def __init__(self, file: Path) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise _missing("tiktoken", file) from error
        ranks = self.ranks(file)
        self._encoding = tiktoken.Encoding(
            file.name, pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )
        self._n_base = len(ranks)
        self.vocab_size = self._n_base + self.N_SPECIAL
        self.bos_id, self.eos_id = self._n_base, self._n_base + 1

    @staticmethod
    def ranks(file: Path) -> dict[bytes, int]:
        """The ranks by token. tiktoken's own reader would take what it has cached for another file of this name."""
        try:
            lines = [line.split() for line in file.read_bytes().splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError as error:
            raise UserError(f"tokenizer={file} is damaged: it has a line that is no token with its rank") from error
        every_byte = {bytes([value]) for value in range(256)}
        if sorted(ranks.values()) != list(range(len(ranks))) or not every_byte <= ranks.keys():
            raise UserError(f"tokenizer={file} is damaged: its ranks are not 0, 1, 2 … or lack a byte")
        return ranks

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special ones left out."""
        return self._encoding.decode([token for token in ids if token < self._n_base])


def _missing(package: str, file: Path) -> UserError:
    return UserError(f"tokenizer={file} needs the package {package}: pip install 'llama_ft[llama3]'")
