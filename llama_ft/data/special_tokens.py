"""What the files around a tokenizer say of where texts begin and end. Models name several ends, in several files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_ft.files import HF_CONFIG, Json, read_json, text_of

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

Offsets = list[tuple[int, int]]  # of each token its characters, from the first to the end


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens by name, and ends by id, as far as they are named."""

    bos: str | None
    eos: str | None
    adds_bos: bool  # before a text, whatever the tokenizer's own file says
    added: Mapping[str, int]  # tokens added to the tokenizer's own
    ends: list[int]
    names: Mapping[str, str]  # by what chat templates call them: bos_token, eos_token …
    chat_template: str | None


def named_tokens(tokenizer: Path, checkpoint: str | None) -> SpecialTokens:
    """What is said beside a tokenizer's file, and in the checkpoint's folder; a UserError where it is damaged."""
    beside = _content(tokenizer.with_name(TOKENIZER_CONFIG))
    added = beside.get("added_tokens_decoder")
    tokens = added.items() if isinstance(added, dict) else ()
    elsewhere = checkpoint if checkpoint not in (None, "builtin", "random") else tokenizer.parent
    folders = {tokenizer.parent, Path(os.path.expanduser(str(elsewhere)))}
    files = [folder / name for name in (HF_CONFIG, GENERATION_CONFIG) for folder in sorted(folders)]
    values = [_content(file).get("eos_token_id") for file in files]
    return SpecialTokens(
        _name(beside.get("bos_token")),
        _name(beside.get("eos_token")),
        beside.get("add_bos_token") is True,
        {name: int(number) for number, token in tokens if (name := _name(token)) and number.isdigit()},
        [end for value in values for end in (value if isinstance(value, list) else [value]) if type(end) is int],
        {key: name for key, token in beside.items() if key.endswith("_token") and (name := _name(token)) is not None},
        next(filter(None, (_chat_template(folder) for folder in sorted(folders))), None),
    )


def _chat_template(folder: Path) -> str | None:
    """The folder's chat template, which transformers writes into a file of its own since version 5."""
    if (file := folder / CHAT_TEMPLATE).is_file():
        return text_of(file, str(file))
    said = _content(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(said, list):  # several, of which one is the default
        named = {each.get("name"): each.get("template") for each in said if isinstance(each, dict)}
        said = named.get("default")
    return said if isinstance(said, str) else None


def _content(file: Path) -> Json:
    return read_json(file, "which tokens are special") if file.is_file() else {}


def _name(token: object) -> str | None:
    """A token's text, which stands by itself or in a description of the token."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
