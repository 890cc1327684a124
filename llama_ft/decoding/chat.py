"""An interactive dialogue: with a chat template a conversation, else each line is a separate instruction."""

import io
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from llama_ft.config import UserError
from llama_ft.data.records import Record
from llama_ft.data.template import ALPACA_TEMPLATE, Template, TextTemplate
from llama_ft.decoding.prompts import prompt_of

TextFn = Callable[[str], None]
AnswerFn = Callable[[str], str]
ASK = "> "
HELP = """\
TEXT          your question; a chat template gets the conversation so far, other templates only this line
/input TEXT   the input of the next instruction
/system TEXT  begin a new conversation with this system message; without TEXT with none
/raw TEXT     a prompt used unchanged, without the template
/adapter DIR  answer with this adapter from now on, on the same weights; without DIR with none
/help         this text
/quit         quit, like Ctrl-D; Ctrl-C stops an answer"""


class _Stopped(KeyboardInterrupt):
    """Ctrl-C during an answer."""


class _Dialogue:
    """The conversation so far, if the template can express it, and the commands."""

    def __init__(
        self, answer: AnswerFn, use_adapter: TextFn, log: TextFn, template: Template, system: str | None
    ) -> None:
        self._answer, self._use_adapter, self._log, self._template = answer, use_adapter, log, template
        self.remembers, self._about = not isinstance(template, TextTemplate), ""
        self.system(system or "")

    def help(self, _: str) -> None:
        self._log(HELP)

    def input(self, text: str) -> None:
        self._about = text.strip()

    def system(self, text: str) -> None:
        if text.strip() and not self.remembers:
            raise UserError(f"template {self._template.name} has no place for a system message")
        self._messages = [{"role": "system", "content": text.strip()}] if text.strip() else []

    def raw(self, text: str) -> None:
        with _stoppable():
            self._answer(prompt_of({"prompt": text}))

    def adapter(self, text: str) -> None:
        self._use_adapter(text.strip())

    def say(self, text: str) -> None:
        """Answer a line, and remember both."""
        if not text.strip():
            return
        asked = Record(text.strip(), self._about, "").messages[0]
        record = {"messages": [*self._messages, asked]} if self.remembers else {"instruction": text.strip()}
        with _stoppable():
            reply = self._answer(prompt_of({"input": self._about} | record, self._template))
        self._messages += [asked, {"role": "assistant", "content": reply}]
        self._about = ""


COMMANDS = ("input", "system", "raw", "adapter", "help")


def chat(
    answer: AnswerFn,
    use_adapter: TextFn,
    read_line: Callable[[], str],
    log: TextFn,
    template: Template = ALPACA_TEMPLATE,
    system: str | None = None,
) -> None:
    """Answer line after line, until /quit, the end of the input, or Ctrl-C outside an answer.

    Args:
        answer: generates, shows and returns the answer to a prompt; its UserErrors are logged.
        use_adapter: switches to the adapter in a folder, or to none for an empty name; its UserErrors are logged.
        read_line: returns the next line without its line break; raises EOFError after the last.
    """
    dialogue = _Dialogue(answer, use_adapter, log, template, system)
    log(f"{'a conversation' if dialogue.remembers else 'one instruction per line'}; /help shows commands, /quit ends")
    while True:
        try:
            line = read_line()
        except (EOFError, KeyboardInterrupt):
            break
        match = re.fullmatch(r"\s*/(\w+)(?:\s(.*))?", line, re.DOTALL)  # a command's text may begin with spaces
        command, text = (match[1], match[2] or "") if match else ("say", line)
        if command == "quit":
            break
        try:
            if match and command not in COMMANDS:
                raise UserError(f"/{command} is not a command; /help lists them")
            getattr(dialogue, command)(text)
        except _Stopped:
            log("stopped")
        except UserError as error:
            log(f"error: {error}")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Make Ctrl-C, but no other signal, raise _Stopped inside the context."""

    def stop(*_: object) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def line_reader() -> Callable[[], str]:
    """A function that reads lines from standard input: on a terminal with a prompt, and with readline if available.

    Bytes that are not UTF-8 become surrogates, so that only the line with them is rejected.
    """
    if sys.stdin is None:  # closed before the start
        raise UserError("interactive=true reads standard input, which is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    is_terminal = sys.stdin.isatty()
    # readline draws on standard output, which must be the terminal too.
    is_edited = is_terminal and sys.stdout.isatty()
    if is_edited:
        with suppress(ImportError):
            import readline  # noqa: F401  # input() uses it once it is imported

    def read_line() -> str:
        try:
            if is_edited:
                return input(ASK)
            if is_terminal:
                print(ASK, end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                raise EOFError
            return line.removesuffix("\n")
        except (EOFError, KeyboardInterrupt):
            if is_terminal:
                print(file=sys.stderr)  # end the prompt's line
            raise

    return read_line
