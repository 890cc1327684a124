"""Llama 3's `tokenizer.model`, as Meta publishes it: a list of ranks."""

import base64
import re
from pathlib import Path

from llama_ft.config import UserError
from llama_ft.data.byte_level import LLAMA_3
from llama_ft.data.special_tokens import Offsets, SpecialTokens


class Tiktoken:
    """Llama 3's `tokenizer.model`: the base tokens with their ranks, which are their ids; 256 special ones follow."""

    # The number of special tokens and the rule that splits text are only in Meta's code, llama/tokenizer.py in
    # https://github.com/meta-llama/llama3. BOS is the first special token, EOS the second; Llama 3.1's <|eom_id|> and
    # <|eot_id|> end messages.
    N_SPECIAL, ENDS = 256, (8, 9)
    LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

    def __init__(self, file: Path, content: bytes, named: SpecialTokens) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise missing_package("tiktoken", file) from error
        ranks = self.ranks(file, content)
        self._encoding = tiktoken.Encoding(
            file.name, pat_str=LLAMA_3, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )
        self._n_base = len(ranks)
        self.vocab_size = self._n_base + self.N_SPECIAL
        self.bos_id, self.eos_id = self._n_base, self._n_base + 1
        self.ends = [*named.ends, *(self._n_base + index for index in self.ENDS)]
        self.last_spelled = self._n_base - 1
        self.special: dict[str, int] = {}  # the file does not name them

    @staticmethod
    def ranks(file: Path, content: bytes) -> dict[bytes, int]:
        """The ranks by token. tiktoken's own reader would use its cache of another file of the same name."""
        try:
            lines = [line.split() for line in content.splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError as error:
            raise UserError(f"tokenizer={file} is damaged: one of its lines is not a token with its rank") from error
        every_byte = {bytes([value]) for value in range(256)}
        if sorted(ranks.values()) != list(range(len(ranks))) or not every_byte <= ranks.keys():
            raise UserError(f"tokenizer={file} is damaged: its ranks are not 0, 1, 2 … or lack a byte")
        return ranks

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._encoding.encode_ordinary(text)

    def encode_chat(self, text: str) -> tuple[list[int], Offsets]:
        """Raise a UserError: the file does not name its special tokens."""
        advice = "python -m llama_ft.convert to=hf makes a folder with tokenizer.json"
        raise UserError(f"tokenizer={self._encoding.name} does not name the tokens of a chat template: {advice}")

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, without special ones."""
        return self._encoding.decode([token for token in ids if token < self._n_base])


def missing_package(package: str, file: Path) -> UserError:
    """The error for a tokenizer that needs a package."""
    return UserError(f"tokenizer={file} needs the package {package}: pip install 'llama_ft[llama3]'")
