"""Turns generated tokens into text as soon as it is final, and stops at stop strings."""

from collections.abc import Iterable

from llama_ft.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # decoding replaces bytes that are not UTF-8 by it
_MAX_INCOMPLETE = 3  # bytes of an incomplete character, which has at most four


class TextStream:
    """Returns the text of a continuation token by token, but nothing that a later token could change.

    All pushes and the flush together return what decode(prompt + continuation) has after decode(prompt), for a prompt
    that has text and ends with a whole character. So a space before the first word is kept, which SentencePiece would
    drop at the start of a text, and bytes that are not UTF-8 become U+FFFD as the tokenizer decides.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Put before the continuation, so that it is not decoded as the start of a text.
        self._before = tokenizer.encode("a")
        self._skip = len(tokenizer.decode(self._before))
        self._tokens: list[int] = []  # those since the text was last final up to its end
        self._n_given = 0  # characters of these tokens that have been returned

    def push(self, token: int) -> str:
        """Add a token and return the text that is now final, possibly empty. Special tokens have no text."""
        self._tokens.append(token)
        text = self._text()
        # A later token can only change the bytes of an incomplete character, which decode to U+FFFD. The text does not
        # tell which U+FFFD are final, so the last few are held back.
        n_held = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_INCOMPLETE)
        certain = text[self._n_given : len(text) - n_held]
        self._n_given += len(certain)
        if n_held == 0:
            self._tokens, self._n_given = [], 0
        return certain

    def flush(self) -> str:
        """Return the text held back at the end of the continuation; an incomplete character becomes U+FFFD."""
        rest = self._text()[self._n_given :]
        self._tokens, self._n_given = [], 0
        return rest

    def _text(self) -> str:
        return self._tokenizer.decode(self._before + self._tokens)[self._skip :]


class StopAt:
    """Ends a text before the first of several stop strings, however the text is cut into pieces.

    The first string is the one that is complete first; of several that end at the same character, the longest. Without
    strings all text passes.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        """Set the stop strings, none of them empty."""
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self.found: str | None = None  # the string that ended the text
        self._held = ""

    def push(self, text: str) -> str:
        """Add a piece of text and return the text that is certain to precede a stop string, possibly empty.

        An end of the text that may begin a stop string is held back. Once one is found, nothing more is returned.
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
        """Return the text held back at the end, which did not become a stop string."""
        rest, self._held = self._held, ""
        return rest
