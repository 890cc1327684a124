"""What a model is asked: from records to prompts, checked before anything is generated."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llama_ft.config import UserError
from llama_ft.data.prompt import prompt_text
from llama_ft.data.record_files import as_object, records_in
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.files import Json

KEYS = ("prompt", "instruction", "input")
MAX_NAMED = 10  # bad records in a message


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the record that it was made of."""

    text: str
    record: Json


def prompt_of(record: Json) -> str:
    """What the model goes on with: `prompt`, or the instruction in Alpaca's template; a UserError if it is unclear."""
    given = {key: record[key] for key in KEYS if record.get(key) is not None}
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
    return str(given["prompt"]) if "prompt" in given else prompt_text(given["instruction"], given.get("input", ""))


def encode_prompt(tokenizer: Tokenizer, text: str, context: int) -> list[int]:
    """The prompt's token ids, BOS first; a UserError if they leave no room in a context of so many tokens."""
    tokens = tokenizer.encode(text, bos=True)
    if len(tokens) >= context:
        raise UserError(f"the prompt has {len(tokens):,} tokens, and the model's context is {context:,}")
    return tokens


def read_prompts(file: Path, reserved: Collection[str], tokenizer: Tokenizer, context: int) -> list[Prompt]:
    """The prompts of a file of records; a UserError if it cannot be read or has no record, or names the bad ones.

    A record may not have the reserved keys, since its answer will; a prompt must leave room in a context of so many
    tokens.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    for where, value in records_in(file, KEYS):
        try:
            record = as_object(value)
            if taken := sorted(record.keys() & set(reserved)):
                raise UserError(f"{taken[0]} is what the answer will be under: give that key another name")
            prompt = Prompt(prompt_of(record), record)
            encode_prompt(tokenizer, prompt.text, context)
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # as it will be written back
            prompts.append(prompt)
        except (UserError, ValueError) as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise UserError(f"prompts={file}: {'; '.join(problems[:MAX_NAMED])}{more}")
    if not prompts:
        raise UserError(f"prompts={file}: there are no records")
    return prompts
