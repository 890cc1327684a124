"""LLaMA's tokenizer: byte-pair encoding through SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226)."""

from pathlib import Path

import sentencepiece

from llama_ft.config import UserError


class Tokenizer:
    """A SentencePiece `tokenizer.model`."""

    def __init__(self, file: Path) -> None:
        """Load the file.

        Raises:
            UserError: if it is missing, or no SentencePiece model with BOS and EOS.
        """
        if not file.is_file():
            what = "is a folder: give the tokenizer.model in it" if file.is_dir() else "there is no such file"
            raise UserError(f"tokenizer={file}: {what}")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer={file} is not a SentencePiece model") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"tokenizer={file} has no BOS or no EOS piece, which LLaMA needs")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of the text, with BOS before and EOS after it where asked for."""
        ids: list[int] = self._processor.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """The text of the ids. SentencePiece drops the space it put before a first word."""
        return str(self._processor.decode(ids))
