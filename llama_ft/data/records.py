"""Records of training data of any kind, and the tokenized samples made from them."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from llama_ft.data.record_files import as_object
from llama_ft.files import Json

Message = Json  # role, content, and anything else that a chat template may read
Samples = Sequence["Sample"]
# The roles of chat templates, and their names in published conversations.
_NAMES = {
    "system": "system developer",
    "user": "user human",
    "assistant": "assistant gpt chatgpt bing bard function_call",
    "tool": "tool function observation",
}
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
FIRST_KEYS = ("messages", "conversations", "instruction", "prompt")  # the first one present tells a record's kind


@dataclass(frozen=True)
class Record:
    """An instruction with its answer, or a conversation that ends with them."""

    instruction: str
    input: str
    output: str
    task: str = ""  # evaluation groups records by it; may be missing
    conversation: tuple[Message, ...] = ()  # all messages, if there are more than an instruction and its answer
    tools: tuple[Json, ...] = ()  # described to the model by a chat template

    @property
    def messages(self) -> list[Message]:
        """The record as a conversation; an input follows its instruction after an empty line."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return list(self.conversation) or [_message("user", asked), _message("assistant", self.output)]

    def to_json(self) -> Json:
        """The record as in a file, readable by `as_record`."""
        instruction = {"instruction": self.instruction, "input": self.input, "output": self.output}
        content: Json = {"messages": list(self.conversation)} if self.conversation else instruction
        extras = {"task": self.task, "tools": list(self.tools)}
        return content | {key: value for key, value in extras.items() if value}

    @property
    def identity(self) -> int:
        """A hash that is equal, within a process, for records with the same text."""
        return hash(str((self.messages, self.tools)))


@dataclass(frozen=True)
class Sample:
    """A tokenized record. Only the tokens in its spans are trained on."""

    tokens: Sequence[int]
    spans: tuple[tuple[int, int], ...]  # (first, end) in ascending order; the text's first token is in none

    @classmethod
    def after(cls, tokens: Sequence[int], n_prompt: int) -> "Sample":
        """A prompt of `n_prompt` tokens, and the rest as its answer."""
        return cls(tokens, ((n_prompt, len(tokens)),) if n_prompt < len(tokens) else ())

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """The number of tokens trained on."""
        return sum(end - first for first, end in self.spans)

    @property
    def n_prompt(self) -> int:
        """The number of tokens not trained on."""
        return len(self) - self.n_targets

    def cut(self, max_length: int | None) -> "Sample":
        """The first `max_length` tokens."""
        end = len(self) if max_length is None else max_length
        return Sample(self.tokens[:end], tuple((first, min(last, end)) for first, last in self.spans if first < end))


def kind_of(record: Json) -> str | None:
    """The record's kind: the first of `FIRST_KEYS` that it has; None also for a prompt without a completion."""
    found = [key for key in FIRST_KEYS if key in record and (key != "prompt" or "completion" in record)]
    return next((key for key in found if record[key] is not None), found[0] if found else None)


def as_record(value: object) -> Record:
    """The record in a JSON value; a ValueError says what is wrong with it."""
    given = as_object(value)
    kind, task = kind_of(given), "" if _is_none(given.get("task")) else str(given["task"])
    if kind is None:
        keys = f"it has {', '.join(given) or 'no keys'}, but records have {', '.join(FIRST_KEYS)} and completion"
        raise ValueError(f"instruction is missing; {keys}; data.columns={{instruction: NAME}} maps other names")
    if kind == "instruction":
        asked, about = _filled(given, "instruction"), "" if _is_none(given.get("input")) else _text(given, "input")
        record = Record(asked, about, _text(given, "output"), task)
    elif kind == "prompt" and not isinstance(given["prompt"], list):
        record = Record(_filled(given, "prompt"), "", _text(given, "completion"), task)
    elif kind == "prompt":
        answer = given["completion"]
        ending = answer if isinstance(answer, list) else [_message("assistant", answer)]
        record = conversation_record(given["prompt"] + ending, task)
    else:
        record = conversation_record(given[kind], task)
    return _with_extras(record, given)


def _with_extras(record: Record, given: Json) -> Record:
    """Add the system message and tools that some published data store next to a conversation."""
    system, tools = given.get("system"), given.get("tools")
    if isinstance(tools, str) and tools.strip():
        with suppress(ValueError):
            tools = json.loads(tools)
    if tools and not isinstance(tools, list):
        raise ValueError("tools must be a list, or a list in JSON")
    if not _is_none(system) and system != "":
        record = with_system(record, checked_text(system, "system"))
    return replace(record, conversation=tuple(record.messages), tools=tuple(tools)) if tools else record


def with_system(record: Record, system: str) -> Record:
    """The record with a system message before it, unless it has one."""
    messages = record.messages
    if messages[0]["role"] == "system":
        return record
    return replace(record, conversation=(_message("system", system), *messages))


def conversation_record(messages: object, task: str = "") -> Record:
    """The record of a list of messages through the assistant's last; a ValueError says what is wrong."""
    if not isinstance(messages, list):
        raise ValueError("a conversation must be a list of messages")
    checked = [_checked(number, message) for number, message in enumerate(messages, 1)]
    while checked and checked[-1]["role"] != "assistant":  # not trained on
        checked.pop()
    if len(checked) < 2:
        raise ValueError("one of its messages after the first must be the assistant's, to train on")
    last = checked[-2:]
    # Then the conversation is just an instruction and its answer.
    is_plain = checked == [_message("user", last[0]["content"]), _message("assistant", last[1]["content"])]
    return Record(last[0]["content"], "", last[1]["content"], task, () if is_plain else tuple(checked))


def _checked(number: int, message: object) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object with role and content")
    said = {key: part for key, part in message.items() if part is not None}
    role, content = (said.pop(key, said.pop(other, None)) for key, other in (("role", "from"), ("content", "value")))
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role}; it must be one of {', '.join(ROLES)}")
    if said.get("weight", 1) not in (0, 1):
        raise ValueError(f"the weight of message {number} must be 0 or 1")
    if isinstance(content, list) and content:
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(map(str, texts)) if len(texts) == len(content) else content
    if content is None and said.get("tool_calls"):
        content = ""
    return _message(ROLES[role], checked_text(content, f"the content of message {number}")) | said


def _message(role: str, content: object) -> Message:
    return {"role": role, "content": content}


def _is_none(value: object) -> bool:
    """Return True for null, and for NaN, which pandas writes for a spreadsheet's empty cell."""
    return value is None or value != value


def _text(given: Json, key: str) -> str:
    if _is_none(given.get(key)):
        raise ValueError(f"{key} is {'null or NaN' if key in given else 'missing'}")
    return checked_text(given[key], key)


def _filled(given: Json, key: str) -> str:
    text = _text(given, key)
    if not text.strip():
        raise ValueError(f"{key} is empty")
    return text


def checked_text(value: object, name: str) -> str:
    """Return the value if it is valid text; raise a ValueError that names it otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} is not text: it holds half of a surrogate pair, or bytes that are not UTF-8")
    return value
