"""What the files around a tokenizer, or a GGUF file, say of where texts begin and end, and how a chat is written.

Models name several ends, in several files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_ft.config import is_gguf
from llama_ft.data.gguf_tokenizer import tokenizer_settings
from llama_ft.files import CHAT_TEMPLATE, HF_CONFIG, Json, read_json, text_of

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"

Offsets = list[tuple[int, int]]  # of each token its characters, from the first to the end


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens by name, and ends by id, as far as they are named."""

    adds_bos: bool  # before a text, whatever the tokenizer's own file says
    added: Mapping[str, int]  # tokens added to the tokenizer's own
    names: Mapping[str, str]  # by what chat templates call them: bos_token, eos_token …
    said: list[tuple[str, list[int]]]  # the files that name ends, and which
    chat_template: str | None

    @property
    def ends(self) -> list[int]:
        """The ends that all files name."""
        return [end for _, ids in self.said for end in ids]


def home_of(tokenizer: Path) -> Path:
    """Where a tokenizer's settings are: in its folder or, of a GGUF file, in itself."""
    return tokenizer if is_gguf(tokenizer) else tokenizer.parent


def named_tokens(tokenizer: Path, checkpoint: str | None) -> SpecialTokens:
    """What is said beside a tokenizer's file, and in the checkpoint; a UserError where it is damaged."""
    home = home_of(tokenizer)
    beside = _content(home, TOKENIZER_CONFIG)
    added = beside.get("added_tokens_decoder")
    tokens = added.items() if isinstance(added, dict) else ()
    elsewhere = checkpoint if checkpoint not in (None, "builtin", "random") else home
    places = list(dict.fromkeys((Path(os.path.expanduser(str(elsewhere))), home)))  # the checkpoint's word comes first
    files = [(place, name) for name in (HF_CONFIG, GENERATION_CONFIG) for place in places]
    said = [(name, _ids(_content(place, name).get("eos_token_id"))) for place, name in files]
    return SpecialTokens(
        beside.get("add_bos_token") is True,
        {name: int(number) for number, token in tokens if (name := _name(token)) and number.isdigit()},
        {key: name for key, token in beside.items() if key.endswith("_token") and (name := _name(token)) is not None},
        [(name, ids) for name, ids in said if ids],
        next(filter(None, map(_chat_template, places)), None),
    )


def _ids(value: object) -> list[int]:
    return [end for end in (value if isinstance(value, list) else [value]) if type(end) is int]


def _chat_template(place: Path) -> str | None:
    """The chat template, which transformers writes into a file of its own since version 5."""
    if (file := place / CHAT_TEMPLATE).is_file():
        return text_of(file, str(file))
    return default_template(_content(place, TOKENIZER_CONFIG).get("chat_template"))


def default_template(said: object) -> str | None:
    """The chat template in the settings of a tokenizer: a text, or of several the one called default."""
    if isinstance(said, list):
        said = {each.get("name"): each.get("template") for each in said if isinstance(each, dict)}.get("default")
    return said if isinstance(said, str) else None


def _content(place: Path, name: str) -> Json:
    """What a file in a folder says of special tokens; of a GGUF file, what such a file would say."""
    if is_gguf(place):
        return tokenizer_settings(place).get(name, {})
    return read_json(place / name, "which tokens are special") if (place / name).is_file() else {}


def _name(token: object) -> str | None:
    """A token's text, which stands by itself or in a description of the token."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
