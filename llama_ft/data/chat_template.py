"""Chat templates: Jinja text shipped with a model that formats a conversation as the model was tuned to read it.

Templates and their variables are those of transformers (utils/chat_template_utils.py). They run in Jinja's sandbox,
since they are untrusted, and `{% generation %}` … `{% endgeneration %}` marks the assistant's text.
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

# Put around the assistant's text where the template marks it: private-use characters, which texts do not contain.
BEGIN, END = "\ue0a7", "\ue0a8"


class _Generation(Extension):
    """`{% generation %}`: puts marks around its content, to be removed later."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Put the block's content between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _refuse(message: str) -> None:
    raise TemplateError(message)


class Rendered(str):
    """A chat template's output: a text that spells special tokens."""


class ChatTemplate:
    """A chat template, compiled."""

    def __init__(self, text: str, name: str, special_names: Mapping[str, str]) -> None:
        """Compile a template for a tokenizer with these special tokens; a UserError reports a syntax error."""
        self.name, self.text, self._known = name, text, {"documents": None, **special_names}
        tags = [_Generation, "jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=tags)
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise UserError(f"template {name} cannot be read as a chat template: {error}") from error

    def _render(self, record: Record, messages: Sequence[Message], asks: bool) -> str:
        """The text of a conversation; `asks` adds the text that precedes the assistant's next answer."""
        known = {"messages": messages, "tools": list(record.tools) or None, "add_generation_prompt": asks}
        try:
            return self._template.render(known | self._known)
        except Exception as error:  # untrusted code: it may fail in any way
            raise ValueError(f"the chat template rejects it: {error}") from error

    def prompt(self, record: Record) -> str:
        """The conversation up to where the record's answer begins."""
        return Rendered(_unmarked(self._render(record, record.messages[:-1], True))[0])

    def answer(self, record: Record, tokenizer: Tokenizer) -> str:
        """The record's answer as the template writes it, without special tokens."""
        written, prompt = _unmarked(self._render(record, record.messages, False))[0], self.prompt(record)
        if not written.startswith(prompt):
            return record.output
        answer = written[len(prompt) :]
        for name in tokenizer.special:
            answer = answer.replace(name, "")
        return answer

    def sample(self, record: Record, tokenizer: Tokenizer, train_on: TrainOn) -> Sample:
        """Tokenize the conversation; trained on are all answers, the last one, or all but the first token.

        Answers are the parts that the template marks, else those that `_answer` finds. As in OpenAI's format, answers
        of weight 0 are not trained on.
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
            raise ValueError("some answers have weight 0, but the chat template does not mark exactly the answers")
        elif train_on is TrainOn.last:
            spans = spans[-1:]
        found = [_token_span(span, offsets) for span in spans]
        return Sample(tokens, tuple(span for span in found if span[0] < span[1]))

    def _answer(self, record: Record, number: int, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
        """The span, in the conversation's text, of the answer in this message, including the token that ends it.

        The answer is the text that the template adds for one more message. Some templates rewrite earlier turns once
        there are later ones, to leave out reasoning: then the answer is the message's content.
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
        """The span of a message's content in the text, through the token that ends the turn."""
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
            raise ValueError("an answer cannot be found in the chat template's text: mark it by {% generation %}")
        ((first, end),) = spans
        following = [record.messages[number + 1]["content"].strip()] if number + 1 < len(record.messages) else []
        limit = next((at for each in following if each and (at := text.find(each, end)) >= 0), len(text))
        ends = [name for name, each in tokenizer.special.items() if each in tokenizer.end_ids]
        for names in (ends, tokenizer.special):  # others may occur within the turn
            if found := [(at, name) for name in names if (at := text.find(name, end, limit)) >= 0]:
                place, name = min(found)
                return first, place + len(name)
        return first, end


def _unmarked(marked: str) -> tuple[str, Offsets]:
    """Remove a text's marks; return the text and the character spans that were between marks."""
    text, *parts = marked.split(BEGIN)
    spans = Offsets()
    for part in parts:
        inside, _, outside = part.partition(END)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


def _token_span(span: tuple[int, int], offsets: Offsets) -> tuple[int, int]:
    """The tokens that overlap a span of characters; a text's first token is never trained on."""
    inside = [n for n, (first, end) in enumerate(offsets) if first < span[1] and span[0] < end and n > 0]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
