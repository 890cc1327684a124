"""What lies beside the weights in a checkpoint's folder: its tokenizer and, for transformers, settings."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_ft.config import TOKENIZER_FILES, ConvertConfig, Format, ModelConfig, UserError
from llama_ft.data.tokenizer import Tokenizer, check_vocabulary
from llama_ft.data.tokenizer_json import tokenizer_files
from llama_ft.model.sizes import HF_CONFIG, hf_config, read_json

GENERATION_CONFIG = "generation_config.json"
# Of a tokenizer in Hugging Face's form: they belong together.
HF_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class Beside:
    """The files that go with the weights, read before anything is written."""

    def __init__(self, config: ConvertConfig) -> None:
        """Read them.

        Raises:
            UserError: if the tokenizer cannot be read, or is not the model's.
        """
        self.config = config
        name = config.tokenizer or (
            str(config.model.builtin_dir / TOKENIZER_FILES[0]) if config.model.is_builtin else None
        )
        self.tokenizer = Path(os.path.expanduser(name)) if name else None
        self.bos_id, self.eos_id = 1, 2  # LLaMA-2's, and those of transformers' LlamaConfig
        if self.tokenizer is not None:
            loaded = Tokenizer(self.tokenizer)
            check_vocabulary(loaded, self.tokenizer, config.model, config.checkpoint)
            self.bos_id, self.eos_id = loaded.bos_id, loaded.eos_id

    def files(self, say: Callable[[str], None]) -> dict[str, bytes]:
        """The tokenizer's files, and how transformers is to generate, by name.

        Raises:
            UserError: if a file cannot be read.
        """
        source, to_hf = Path(os.path.expanduser(str(self.config.checkpoint))), self.config.to is Format.hf
        files: dict[str, bytes] = {}
        if to_hf and (source / GENERATION_CONFIG).is_file():
            files[GENERATION_CONFIG] = _read(source / GENERATION_CONFIG)
        elif to_hf:
            files[GENERATION_CONFIG] = _json({"bos_token_id": self.bos_id, "eos_token_id": self.eos_id})
        if self.tokenizer is None:
            return files
        folder = self.tokenizer.parent
        theirs = [folder / name for name in HF_TOKENIZER_FILES if (folder / name).is_file()] if to_hf else []
        kind = TOKENIZER_FILES[1] if self.tokenizer.suffix == ".json" else TOKENIZER_FILES[0]
        files |= {file.name: _read(file) for file in theirs} | {kind: _read(self.tokenizer)}
        if to_hf and not {"tokenizer.json", "tokenizer_config.json"} <= files.keys():
            try:
                files = self._hf_tokenizer() | files
            except UserError as error:
                say(f"{error}; transformers may split text otherwise")
        return files

    def _hf_tokenizer(self) -> dict[str, bytes]:
        assert self.tokenizer is not None
        if self.tokenizer.suffix == ".json":
            names = json.loads(self.tokenizer.read_text(encoding="utf-8"))["added_tokens"]
            by_id = {token["id"]: token["content"] for token in names}
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            config |= {"bos_token": by_id[self.bos_id], "eos_token": by_id[self.eos_id]}
            return {"tokenizer_config.json": _json(config)}
        made = tokenizer_files(self.tokenizer, llama_3_1=self.config.model.rope_factor != 1)
        return {name: _json(content) for name, content in made.items()}

    def hf_config(self, model: ModelConfig, dtype: str) -> dict[str, Any]:
        """What config.json is to hold: what the source's does, where there is one, with what has changed.

        Raises:
            UserError: if the source's cannot be read.
        """
        ours = hf_config(model, dtype, self.bos_id, self.eos_id)
        theirs = Path(os.path.expanduser(str(self.config.checkpoint))) / HF_CONFIG
        if not theirs.is_file():
            return ours
        content = read_json(theirs)
        changed = {key: ours[key] for key in ("max_position_embeddings", "tie_word_embeddings")}
        return content | changed | {"dtype" if "dtype" in content else "torch_dtype": dtype}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
