"""What a model is asked: from records to prompts, checked before anything is generated."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llama_ft.config import UserError
from llama_ft.data.record_files import as_object, records_in
from llama_ft.data.records import Record, conversation_record
from llama_ft.data.template import ALPACA_TEMPLATE, Template, encode_prompt
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.files import Json

KEYS = ("prompt", "instruction", "input")
CONVERSATIONS = ("messages", "conversations")
MAX_NAMED = 10  # bad records in a message


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the record that it was made of."""

    text: str
    record: Json


def prompt_of(record: Json, template: Template = ALPACA_TEMPLATE, system: str | None = None) -> str:
    """What the model goes on with: `prompt` as it is, or a conversation or instruction as the template writes it.

    Args:
        record: has `prompt`; or `instruction`, and `input` where it needs that; or `messages`, the last one the user's.
        system: a system message that comes before an instruction.

    Raises:
        UserError: if it is unclear what is asked, or the template does not take it.
    """
    given = {key: record[key] for key in KEYS if record.get(key) is not None}
    if messages := next((record[key] for key in CONVERSATIONS if record.get(key)), None):
        return _asked(template, messages)
    for key, text in given.items():
        if not isinstance(text, str):
            raise UserError(f"{key} must be a text")
        if re.search("[\ud800-\udfff]", text):
            raise UserError(f"{key} is not text: it holds half of a surrogate pair, or bytes that are not UTF-8")
    if ("prompt" in given) == ("instruction" in given):
        raise UserError("either prompt or instruction must be there, and not both")
    if given.get("prompt") == "" or not given.get("instruction", "-").strip():
        raise UserError(f"{'prompt' if 'prompt' in given else 'instruction'} is empty")
    if "prompt" in given and given.get("input"):
        raise UserError("input belongs to an instruction, and there is a prompt")
    if "prompt" in given:
        return str(given["prompt"])
    asking = Record(given["instruction"], given.get("input", ""), "")
    if system is None:
        return template.prompt(asking)
    return _asked(template, [{"role": "system", "content": system}, asking.messages[0]])


def _asked(template: Template, messages: object) -> str:
    """The prompt of a conversation that ends with what is asked."""
    if not isinstance(messages, list):
        raise UserError("a conversation must be a list of messages")
    try:
        return template.prompt(conversation_record([*messages, {"role": "assistant", "content": ""}]))
    except ValueError as error:
        raise UserError(str(error)) from error


def encode_in_context(text: str, tokenizer: Tokenizer, context: int) -> list[int]:
    """The prompt's token ids; a UserError if they leave no room in a context of so many tokens."""
    tokens = encode_prompt(text, tokenizer)
    if len(tokens) >= context:
        raise UserError(f"the prompt has {len(tokens):,} tokens, and the model's context is {context:,}")
    return tokens


def read_prompts(
    file: Path,
    reserved: Collection[str],
    tokenizer: Tokenizer,
    context: int,
    template: Template = ALPACA_TEMPLATE,
    system: str | None = None,
) -> list[Prompt]:
    """The prompts of a file of records; a UserError if it cannot be read or has no record, or names the bad ones.

    A record may not have the reserved keys, since its answer will; a prompt must leave room in a context of so many
    tokens.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    for where, value in records_in(file, KEYS + CONVERSATIONS):
        try:
            record = as_object(value)
            if taken := sorted(record.keys() & set(reserved)):
                raise UserError(f"{taken[0]} is what the answer will be under: give that key another name")
            prompt = Prompt(prompt_of(record, template, system), record)
            encode_in_context(prompt.text, tokenizer, context)
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # as it will be written back
            prompts.append(prompt)
        except (UserError, ValueError, TypeError) as error:  # of a type that JSON has not, too
            problems.append(f"{where}: {error}")
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise UserError(f"prompts={file}: {'; '.join(problems[:MAX_NAMED])}{more}")
    if not prompts:
        raise UserError(f"prompts={file}: there are no records")
    return prompts
