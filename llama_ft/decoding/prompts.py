"""Makes prompts from records, and checks them before anything is generated."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llama_ft.config import UserError
from llama_ft.data.record_files import as_object, records_in
from llama_ft.data.records import Record, as_record, checked_text, with_system
from llama_ft.data.template import ALPACA_TEMPLATE, Template, encode_prompt
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.files import Json

KEYS = ("prompt", "instruction", "input")
CONVERSATIONS = ("messages", "conversations")
MAX_NAMED = 10  # bad records named in an error


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the record that it was made from."""

    text: str
    record: Json
    template: str = ""  # the content of its template


def prompt_of(record: Json, template: Template = ALPACA_TEMPLATE, system: str | None = None) -> str:
    """The text for the model to continue: `prompt` unchanged, or a conversation or instruction in the template.

    Args:
        record: has `prompt`; or `instruction` and optionally `input`; or `messages`, the last one the user's.
        system: a system message for conversations and instructions that have none.

    A UserError if the record is ambiguous, or the template rejects it.
    """
    try:
        asked = _asked(record, system)
        return asked if isinstance(asked, str) else template.prompt(asked)
    except ValueError as error:
        raise UserError(str(error)) from error


def _asked(record: Json, system: str | None) -> Record | str:
    """A prompt to use unchanged, or a record, with an empty answer, for the template."""
    record = {key: value for key, value in record.items() if value is not None}
    prompt, instruction, about = map(record.get, KEYS)
    messages = next((record[key] for key in CONVERSATIONS if key in record), None)
    if messages is None and instruction is None and ("completion" in record or isinstance(prompt, list)):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]  # as in training
    if messages is not None:
        answer = {"role": "assistant", "content": ""}
        asked = as_record(record | {"messages": [*messages, answer] if isinstance(messages, list) else messages})
        if (role := asked.messages[-2]["role"]) not in ("user", "tool"):
            raise ValueError(f"the last of its messages must be the user's, not the {role}'s")
    elif instruction is not None and (prompt is None or "completion" in record):
        asked = as_record(record | {"output": ""})
    elif prompt is None or instruction is not None:
        raise ValueError("it must have either prompt or instruction, not both")
    elif about or system or record.get("system"):
        key = "input" if about else "system"
        raise ValueError(f"{key} belongs to an instruction, but it has a prompt")
    elif prompt == "":
        raise ValueError("prompt is empty")
    else:
        return checked_text(prompt, "prompt")
    return asked if system is None else with_system(asked, system)


def encode_in_context(text: str, tokenizer: Tokenizer, context: int) -> list[int]:
    """The prompt's token ids; a UserError if they leave no room in a context of `context` tokens."""
    tokens = encode_prompt(text, tokenizer)
    if len(tokens) >= context:
        raise UserError(f"the prompt has {len(tokens):,} tokens, but the model's context is {context:,}")
    return tokens


def read_prompts(
    file: Path,
    reserved: Collection[str],
    tokenizer: Tokenizer,
    context: int,
    template: Template = ALPACA_TEMPLATE,
    system: str | None = None,
) -> list[Prompt]:
    """The prompts of a file of records; a UserError if it cannot be read, is empty, or has bad records, which it names.

    A record may not have the reserved keys, which its answer will use; a prompt must leave room in a context of
    `context` tokens.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    for where, value in records_in(file, KEYS + CONVERSATIONS):
        try:
            record = as_object(value)
            if taken := sorted(record.keys() & set(reserved)):
                raise UserError(f"the key {taken[0]} is reserved for the answer: rename it")
            prompt = Prompt(prompt_of(record, template, system), record, template.text)
            encode_in_context(prompt.text, tokenizer, context)
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # as it will be written back
            prompts.append(prompt)
        except (UserError, ValueError, TypeError) as error:  # also types that JSON lacks
            problems.append(f"{where}: {error}")
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise UserError(f"prompts={file}: {'; '.join(problems[:MAX_NAMED])}{more}")
    if not prompts:
        raise UserError(f"prompts={file}: there are no records")
    return prompts
