"""Chat templates: the Jinja text that comes with a model and writes a conversation down as it was tuned to read it.

Templates and their variables are as transformers has them (utils/chat_template_utils.py): they run in Jinja's sandbox,
since they come from strangers, and `{% generation %}` … `{% endgeneration %}` marks what the assistant says.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama_ft.config import TrainOn, UserError
from llama_ft.data.records import Message, Record, Sample
from llama_ft.data.special_tokens import Offsets
from llama_ft.data.tokenizer import Tokenizer

# Around what the assistant says, where the template marks it. They are private-use characters, which texts do not have.
BEGIN, END = "\ue0a7", "\ue0a8"


class _Generation(Extension):
    """`{% generation %}`: puts marks around what is inside, to be taken out again."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content, between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes what HTML would


class Rendered(str):
    """What a chat template has written: a text that spells special tokens."""


class ChatTemplate:
    """A chat template, compiled."""

    def __init__(self, text: str, name: str, special_names: Mapping[str, str]) -> None:
        """Compile it, for a tokenizer that has these special tokens; a UserError says where it is wrong."""
        self.name, self._known = name, {"tools": None, "documents": None, **special_names}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise UserError(f"template {name} is no chat template that can be read: {error}") from error

    def _render(self, messages: Sequence[Message], asks: bool) -> str:
        """The text of a conversation, and with `asks` of what comes before the assistant's next answer."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=asks, **self._known)
        except Exception as error:  # strangers' code: it may fail in any way
            raise ValueError(f"the chat template does not take it: {error}") from error

    def prompt(self, record: Record) -> str:
        """The conversation up to where the record's answer begins."""
        return Rendered(_unmarked(self._render(record.messages[:-1], True))[0])

    def sample(self, record: Record, tokenizer: Tokenizer, train_on: TrainOn) -> Sample:
        """The whole conversation, of which all answers, the last one, or all but the first token are trained on.

        Answers are what the template marks as such, else what it writes when it is given one message more, up to the
        special token that ends it.
        """
        messages = record.messages
        text, spans = _unmarked(self._render(messages, False))
        tokens, offsets = tokenizer.encode_chat(text)
        if train_on is TrainOn.all:
            return Sample.after(tokens, 1)
        if not spans:
            answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            wanted = answers[-1:] if train_on is TrainOn.last else answers
            spans = [self._answer(messages, number, text, tokenizer) for number in wanted]
        if train_on is TrainOn.last:
            spans = spans[-1:]
        found = [_token_span(span, offsets) for span in spans]
        return Sample(tokens, tuple(span for span in found if span[0] < span[1]))

    def _answer(self, messages: Sequence[Message], number: int, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
        """Where in the conversation's text the answer stands that is this message of it."""
        before = self._render(messages[:number], True)
        through = self._render(messages[: number + 1], False)
        if not (through.startswith(before) and text.startswith(through)):
            problem = "the chat template writes earlier turns otherwise once there are later ones"
            raise ValueError(f"{problem}: give data.train_on=last, or a template with {{% generation %}}")
        bare = through.rstrip()
        is_ended = bare.endswith(tuple(tokenizer.special))
        return len(before), len(bare if is_ended else through)


def _unmarked(marked: str) -> tuple[str, Offsets]:
    """A text without its marks, and the spans of characters that were between them."""
    text, *parts = marked.split(BEGIN)
    spans = Offsets()
    for part in parts:
        inside, _, outside = part.partition(END)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


def _token_span(span: tuple[int, int], offsets: Offsets) -> tuple[int, int]:
    """The tokens that have characters of the span; the first token of all is never trained on."""
    inside = [n for n, (first, end) in enumerate(offsets) if first < span[1] and span[0] < end and n > 0]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
