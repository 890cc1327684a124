"""A dialogue a line at a time: each line is an instruction by itself, or a command."""

import io
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from llama_ft.config import UserError
from llama_ft.decoding.prompts import prompt_of

TextFn = Callable[[str], None]
ASK = "> "
HELP = """\
TEXT          an instruction, put into Alpaca's template; earlier ones are not remembered
/input TEXT   what the next instruction is about
/raw TEXT     a prompt as it is, without the template
/adapter DIR  answer with this adapter from now on, on the same weights; without DIR with none
/help         this text
/quit         the end, as Ctrl-D; Ctrl-C stops an answer"""


class _Stopped(KeyboardInterrupt):
    """Ctrl-C while an answer is given."""


def chat(answer: TextFn, use_adapter: TextFn, read_line: Callable[[], str], log: TextFn) -> None:
    """Answer line after line, until /quit, the end of the input, or Ctrl-C where no answer is given.

    Args:
        answer: generates and shows what follows a prompt. A UserError of it is logged, and the dialogue goes on.
        use_adapter: likewise changes to the adapter in a folder; an empty name is none.
        read_line: the next line without its line break; raises EOFError after the last.
    """
    log("an instruction a line; /help says more, /quit ends")
    about = ""
    while True:
        try:
            line = read_line()
        except (EOFError, KeyboardInterrupt):
            break
        match = re.fullmatch(r"\s*/(\w+)(?:\s(.*))?", line, re.DOTALL)  # a command's text may begin with spaces
        command, text = (match[1], match[2] or "") if match else ("", line.strip())
        if command == "quit":
            break
        if command == "help":
            log(HELP)
        elif command == "input":
            about = text.strip()
        elif command == "raw":
            with _logged(log), _stoppable():
                answer(prompt_of({"prompt": text}))
        elif command == "adapter":
            with _logged(log):
                use_adapter(text.strip())
        elif command:
            log(f"error: /{command} is no command; /help lists them")
        elif text:
            with _logged(log), _stoppable():
                answer(prompt_of({"instruction": text, "input": about}))
            about = ""


@contextmanager
def _logged(log: TextFn) -> Iterator[None]:
    """Log what stops the block, and go on."""
    try:
        yield
    except _Stopped:
        log("stopped")
    except UserError as error:
        log(f"error: {error}")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let Ctrl-C, and nothing else that ends a process, raise _Stopped inside."""

    def stop(*_: object) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def line_reader() -> Callable[[], str]:
    """What reads lines from standard input: on a terminal after a prompt, and edited with readline where it is there.

    Bytes that are not UTF-8 come as surrogates, to be refused with the line that has them.
    """
    if sys.stdin is None:  # closed before the start
        raise UserError("interactive=true reads standard input, which is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    is_terminal = sys.stdin.isatty()
    # readline draws on standard output, so that must be the terminal too.
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
                print(file=sys.stderr)  # ends the line of the prompt
            raise

    return read_line
