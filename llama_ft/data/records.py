"""Records of training data, whatever their kind, and the tokenized samples made of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llama_ft.data.record_files import as_object
from llama_ft.files import Json

Message = Json  # of a conversation: its role and content, and what else a chat template may read
# What the parties of `conversations` are called in published data, by the roles of chat templates.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# The kinds of records by the keys that they have, in the order in which these are looked for.
KINDS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction",),
    "prompt": ("prompt", "completion"),
}


@dataclass(frozen=True)
class Record:
    """One instruction with its answer, or a conversation that ends with them."""

    instruction: str
    input: str
    output: str
    task: str = ""  # by which evaluation groups records; may be missing
    conversation: tuple[Message, ...] = ()  # all of it, where there is more to it than an instruction and its answer

    @property
    def messages(self) -> list[Message]:
        """The record as a conversation; what an instruction is about follows it after an empty line."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return list(self.conversation) or [_message("user", asked), _message("assistant", self.output)]


@dataclass(frozen=True)
class Sample:
    """A tokenized record. The tokens of its spans are trained on, the others are only read."""

    tokens: Sequence[int]
    spans: tuple[tuple[int, int], ...]  # (first, end) in ascending order; the first token of all is in none

    @classmethod
    def after(cls, tokens: Sequence[int], n_prompt: int) -> "Sample":
        """A prompt of so many tokens, and its answer, which is the rest."""
        return cls(tokens, ((n_prompt, len(tokens)),) if n_prompt < len(tokens) else ())

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Number of tokens that are trained on."""
        return sum(end - first for first, end in self.spans)

    @property
    def n_prompt(self) -> int:
        """Number of tokens that are not."""
        return len(self) - self.n_targets

    def cut(self, max_length: int | None) -> "Sample":
        """The first so many tokens."""
        end = len(self) if max_length is None else max_length
        return Sample(self.tokens[:end], tuple((first, min(last, end)) for first, last in self.spans if first < end))


def kind_of(record: Json) -> str:
    """Which kind of record an object is, by its keys; none is an empty text."""
    return next((kind for kind, keys in KINDS.items() if set(keys) <= record.keys()), "")


def as_record(value: object, kind: str = "") -> Record:
    """The record in a JSON value; a ValueError says what is wrong with it, or that it is not of the kind asked for."""
    # Null and NaN, which pandas makes of a spreadsheet's empty cell, are no values.
    given = as_object(value)
    record = {key: part for key, part in given.items() if part is not None and part == part}  # as NaN is not
    if not (found := kind_of(given) or kind):
        known = ", ".join(" and ".join(keys) for keys in KINDS.values())
        raise ValueError(f"instruction is missing; it has {', '.join(given) or 'no keys'}, and records have {known}")
    if found != (kind or found):
        raise ValueError(f"it is a record of {found}, and those before it are of {kind}: give each kind its own file")
    task = str(record.get("task") or "")
    if found == "instruction":
        instruction, about, output = _texts(record, given, {"input": ""}, ("instruction", "input", "output"))
        return Record(instruction, about, output, task)
    if found == "prompt" and not isinstance(record.get("prompt"), list):
        prompt, completion = _texts(record, given, {}, ("prompt", "completion"))
        return Record(prompt, "", completion, task)
    messages: object = record.get(found)
    if found == "prompt":  # a conversation in two parts
        answer = record.get("completion")
        ending = answer if isinstance(answer, list) else [_message("assistant", answer)]
        messages = [*record["prompt"], *ending]
    return conversation_record(messages, task)


def conversation_record(messages: object, task: str = "") -> Record:
    """The record of a list of messages, the last of which is the assistant's; a ValueError says what is wrong."""
    if not isinstance(messages, list):
        raise ValueError("a conversation must be a list of messages")
    checked = [_checked(number, message) for number, message in enumerate(messages, 1)]
    if len(checked) < 2 or checked[-1]["role"] != "assistant":
        raise ValueError("the last of its messages must be the assistant's, which is what is trained on")
    last = checked[-2:]
    # Then instruction and answer say all that there is.
    is_plain = checked == [_message("user", last[0]["content"]), _message("assistant", last[1]["content"])]
    return Record(last[0]["content"], "", last[1]["content"], task, () if is_plain else tuple(checked))


def _checked(number: int, message: object) -> Message:
    """A message with its role as chat templates know it."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object with role and content")
    said = {key: part for key, part in message.items() if part is not None}
    role, content = (said.pop(key, said.pop(other, None)) for key, other in (("role", "from"), ("content", "value")))
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role}; there are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number} must be a text")
    content.encode()  # raises a ValueError at half of a surrogate pair
    return _message(ROLES[role], content) | said


def _message(role: str, content: object) -> Message:
    return {"role": role, "content": content}


def _texts(record: Json, given: Json, defaults: Json, keys: Iterable[str]) -> list[str]:
    """The texts under these keys, of which the first may not be empty."""
    texts = list[str]()
    for key in keys:
        if (text := record.get(key, defaults.get(key))) is None:
            raise ValueError(f"{key} is {'null or NaN' if key in given else 'missing'}")
        if not isinstance(text, str):
            raise ValueError(f"{key} must be a text")
        text.encode()  # raises a ValueError at half of a surrogate pair
        if not texts and not text.strip():
            raise ValueError(f"{key} is empty")
        texts.append(text)
    return texts
