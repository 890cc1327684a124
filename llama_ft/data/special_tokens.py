"""Special tokens and chat templates, as given by the files next to a tokenizer, or by a GGUF file.

Models name several end tokens, in several files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_ft.config import is_gguf, path_of
from llama_ft.data.gguf_tokenizer import tokenizer_settings
from llama_ft.files import CHAT_TEMPLATE, HF_CONFIG, Json, read_json, text_of

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"

Offsets = list[tuple[int, int]]  # each token's characters, (first, end)


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens by name, and end tokens by id."""

    adds_bos: bool  # texts begin with BOS, whatever the tokenizer's own file says
    added: Mapping[str, int]  # tokens added to the tokenizer's own
    names: Mapping[str, str]  # by their variables in chat templates: bos_token, eos_token …
    named_ends: list[tuple[str, list[int]]]  # (file, the end tokens that it names)
    chat_template: str | None

    @property
    def ends(self) -> list[int]:
        """The end tokens of all files."""
        return [end for _, ids in self.named_ends for end in ids]


def home_of(tokenizer: Path) -> Path:
    """The place of a tokenizer's settings: its folder, or the file itself if it is GGUF."""
    return tokenizer if is_gguf(tokenizer) else tokenizer.parent


def named_tokens(tokenizer: Path, checkpoint: str | None) -> SpecialTokens:
    """Read the settings next to a tokenizer's file and in the checkpoint; a UserError if one is damaged."""
    home = home_of(tokenizer)
    settings = _content(home, TOKENIZER_CONFIG)
    added = settings.get("added_tokens_decoder")
    tokens = added.items() if isinstance(added, dict) else ()
    elsewhere = checkpoint if checkpoint not in (None, "builtin", "random") else home
    places = list(dict.fromkeys((path_of(str(elsewhere)), home)))  # the checkpoint comes first
    files = [(place, name) for name in (HF_CONFIG, GENERATION_CONFIG) for place in places]
    said = [(name, _ids(_content(place, name).get("eos_token_id"))) for place, name in files]
    return SpecialTokens(
        settings.get("add_bos_token") is True,
        {name: int(number) for number, token in tokens if (name := _name(token)) and number.isdigit()},
        {key: name for key, token in settings.items() if key.endswith("_token") and (name := _name(token)) is not None},
        [(name, ids) for name, ids in said if ids],
        next(filter(None, map(_chat_template, places)), None),
    )


def _ids(value: object) -> list[int]:
    return [end for end in (value if isinstance(value, list) else [value]) if type(end) is int]


def _chat_template(place: Path) -> str | None:
    """The chat template, which transformers writes into its own file since version 5."""
    if (file := place / CHAT_TEMPLATE).is_file():
        return text_of(file, str(file))
    return default_template(_content(place, TOKENIZER_CONFIG).get("chat_template"))


def default_template(said: object) -> str | None:
    """The chat template in a tokenizer's settings: a text, or the one named default among several."""
    if isinstance(said, list):
        said = {each.get("name"): each.get("template") for each in said if isinstance(each, dict)}.get("default")
    return said if isinstance(said, str) else None


def _content(place: Path, name: str) -> Json:
    """The content of a settings file in a folder, or its equivalent in a GGUF file."""
    if is_gguf(place):
        return tokenizer_settings(place).get(name, {})
    return read_json(place / name, "which tokens are special") if (place / name).is_file() else {}


def _name(token: object) -> str | None:
    """A token's text, given directly or inside a description of the token."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
