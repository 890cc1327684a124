"""Text as it is generated: from tokens to text that is certain, and where to stop."""

from collections.abc import Iterable

from llama_ft.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoding puts in the place of bytes that are no UTF-8
_MAX_INCOMPLETE = 3  # bytes of an incomplete character: it has four at most


class TextStream:
    """The text of a continuation, token by token, with nothing given out that a later token could change.

    All pushes and the flush together are what decode(prompt + continuation) has after decode(prompt), for a prompt that
    has text and ends with a whole character. So a space before the first word is kept, which SentencePiece would drop
    at the start of a text, and bytes that are no UTF-8 become U+FFFD as the tokenizer decides.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Something must stand before the continuation, or it would be decoded as the start of a text.
        self._before = tokenizer.encode("a")
        self._skip = len(tokenizer.decode(self._before))
        self._tokens: list[int] = []  # those since the text was last certain to its end
        self._n_given = 0  # characters of theirs that have been given out

    def push(self, token: int) -> str:
        """Take in a token, and return the text that is now certain; it may be empty. Special tokens have no text."""
        self._tokens.append(token)
        text = self._text()
        # Bytes of an incomplete character are all that a later token can change, and they show as U+FFFD. Which of
        # those are final cannot be seen from the text, so the last few are held back.
        n_held = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_INCOMPLETE)
        certain = text[self._n_given : len(text) - n_held]
        self._n_given += len(certain)
        if n_held == 0:
            self._tokens, self._n_given = [], 0
        return certain

    def flush(self) -> str:
        """The text that was held back, at the end of the continuation; an incomplete character becomes U+FFFD."""
        rest = self._text()[self._n_given :]
        self._tokens, self._n_given = [], 0
        return rest

    def _text(self) -> str:
        return self._tokenizer.decode(self._before + self._tokens)[self._skip :]


class StopAt:
    """Ends a text before the first of some strings, wherever the pieces of the text are cut.

    First is the string that is complete first; of several that end at the same character, the longest. With no strings
    all text passes.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        """Take in the strings, of which none is empty."""
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self.found: str | None = None  # the string that ended the text
        self._held = ""

    def push(self, text: str) -> str:
        """Take in a piece of text, and return what is certain to come before a stop string; it may be empty.

        Held back is the end that may be the beginning of one. Once one is found, nothing more is returned.
        """
        if self.found is not None:
            return ""
        text = self._held + text
        matches = [(text.find(string), string) for string in self._strings if string in text]
        if matches:
            start, self.found = min(matches, key=lambda match: (match[0] + len(match[1]), match[0]))
            self._held = ""
            return text[:start]
        ends = range(min(len(text), self._longest), 0, -1)
        n_held = next((n for n in ends if any(string.startswith(text[-n:]) for string in self._strings)), 0)
        certain, self._held = text[: len(text) - n_held], text[len(text) - n_held :]
        return certain

    def flush(self) -> str:
        """The text that was held back, at the end: no stop string has come of it."""
        rest, self._held = self._held, ""
        return rest
