"""Chat templates: the Jinja text that comes with a model and writes a conversation down as it was tuned to read it.

Templates and their variables are as transformers has them (utils/chat_template_utils.py): they run in Jinja's sandbox,
since they come from strangers, and `{% generation %}` … `{% endgeneration %}` marks what the assistant says.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
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


class Rendered(str):
    """What a chat template has written: a text that spells special tokens."""


class ChatTemplate:
    """A chat template, compiled."""

    def __init__(self, text: str, name: str, special_names: Mapping[str, str]) -> None:
        """Compile it, for a tokenizer that has these special tokens; a UserError says where it is wrong."""
        self.name, self.text, self._known = name, text, {"documents": None, **special_names}
        tags = [_Generation, "jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=tags)
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes what HTML would
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise UserError(f"template {name} is no chat template that can be read: {error}") from error

    def _render(self, record: Record, messages: Sequence[Message], asks: bool) -> str:
        """The text of a conversation, and with `asks` of what comes before the assistant's next answer."""
        known = {"messages": messages, "tools": list(record.tools) or None, "add_generation_prompt": asks}
        try:
            return self._template.render(known | self._known)
        except Exception as error:  # strangers' code: it may fail in any way
            raise ValueError(f"the chat template does not take it: {error}") from error

    def prompt(self, record: Record) -> str:
        """The conversation up to where the record's answer begins."""
        return Rendered(_unmarked(self._render(record, record.messages[:-1], True))[0])

    def answer(self, record: Record, tokenizer: Tokenizer) -> str:
        """What a perfect answer to the record is: as the template writes it, without special tokens."""
        written, prompt = _unmarked(self._render(record, record.messages, False))[0], self.prompt(record)
        if not written.startswith(prompt):
            return record.output
        answer = written[len(prompt) :]
        for name in tokenizer.special:
            answer = answer.replace(name, "")
        return answer

    def sample(self, record: Record, tokenizer: Tokenizer, train_on: TrainOn) -> Sample:
        """The whole conversation, of which all answers, the last one, or all but the first token are trained on.

        Answers are what the template marks as such, else what `_answer` finds. Those of weight 0 are not trained on, as
        in OpenAI's format.
        """
        messages = record.messages
        text, spans = _unmarked(self._render(record, messages, False))
        tokens, offsets = tokenizer.encode_chat(text)
        if train_on is TrainOn.all:
            return Sample.after(tokens, 1)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers[-1:] if train_on is TrainOn.last else answers
        weighed = [number for number in wanted if messages[number].get("weight") != 0]
        if not spans:
            spans = [self._answer(record, number, text, tokenizer) for number in weighed]
        elif len(spans) == len(answers):
            spans = [span for number, span in zip(answers, spans, strict=True) if number in weighed]
        elif any(messages[number].get("weight") == 0 for number in answers):
            raise ValueError("the chat template marks other parts than answers, of which some have weight 0")
        elif train_on is TrainOn.last:
            spans = spans[-1:]
        found = [_token_span(span, offsets) for span in spans]
        return Sample(tokens, tuple(span for span in found if span[0] < span[1]))

    def _answer(self, record: Record, number: int, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
        """Where in the conversation's text the answer stands that is this message of it, with the token that ends it.

        It is what the template writes when it is given one message more. Some templates write earlier turns otherwise
        once there are later ones, to leave out reasoning: then it is the message's content.
        """
        messages = record.messages
        before = self._render(record, messages[:number], True) if number else None
        through = self._render(record, messages[: number + 1], False)
        if before is None or not (through.startswith(before) and text.startswith(through)):
            return self._content(record, number, text, tokenizer)
        if before == through:
            raise ValueError("the chat template writes no answer")
        bare = through.rstrip()
        return len(before), len(bare if bare.endswith(tuple(tokenizer.special)) else through)

    def _content(self, record: Record, number: int, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
        """Where in the text a message's content stands, with all that follows to the token that ends the turn."""
        content = record.messages[number]["content"]
        reasoning, ends_it, rest = content.rpartition("</think>")
        answer = rest.lstrip("\n") if ends_it else content
        for form in (content, content.strip(), answer, answer.strip()):
            marked = record.messages
            before = f"{reasoning}{ends_it}" if ends_it and form in (answer, answer.strip()) else ""
            marked[number] = marked[number] | {"content": f"{before}{BEGIN}{form}{END}"}
            again, spans = _unmarked(self._render(record, marked, False))
            if again == text and len(spans) == 1:
                break
        else:
            raise ValueError("where the chat template writes an answer cannot be told: mark it by {% generation %}")
        ((first, end),) = spans
        following = [record.messages[number + 1]["content"].strip()] if number + 1 < len(record.messages) else []
        limit = next((at for each in following if each and (at := text.find(each, end)) >= 0), len(text))
        ends = [name for name, each in tokenizer.special.items() if each in tokenizer.end_ids]
        for names in (ends, tokenizer.special):  # others may stand within the turn
            if found := [(at, name) for name in names if (at := text.find(name, end, limit)) >= 0]:
                place, name = min(found)
                return first, place + len(name)
        return first, end


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
