"""The files next to the weights in a checkpoint folder: the tokenizer and, for transformers, settings."""

import json
from dataclasses import replace
from pathlib import Path

from llama_ft.config import ConvertConfig, Format, ModelConfig, ModelSource, UserError, path_of
from llama_ft.config.source import TOKENIZER_FILES, found_tokenizer, is_gguf
from llama_ft.data.gguf_tokenizer import read_tokenizer
from llama_ft.data.special_tokens import GENERATION_CONFIG, TOKENIZER_CONFIG, default_template, home_of
from llama_ft.data.tokenizer import Tokenizer, check_vocabulary
from llama_ft.data.tokenizer_json import FAST_TOKENIZER, tokenizer_files
from llama_ft.exporting.gguf import GgufFile
from llama_ft.exporting.source import Source
from llama_ft.files import CHAT_TEMPLATE, HF_CONFIG, Json, explained, read_json, text_of, whole_file
from llama_ft.model.folder import LLAMA_3_VOCABULARY
from llama_ft.model.sizes import HOLDS_SIZES, NO_CHECK, hf_config
from llama_ft.records.result import BUILTIN_TEMPLATES, template_of_run
from llama_ft.system import Log

OF_THE_SOURCE_ALONE = ("quantization_config", "compression_config")  # the written weights are not quantized
LLAMA_2_IDS, LLAMA_3_IDS = (1, 2), (128_000, 128_001)  # BOS and EOS
# The files of a tokenizer in Hugging Face's form, which belong together.
HF_TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
""".split()


class SidecarFiles:
    """The files that go with the weights, read before anything is written."""

    def __init__(self, config: ConvertConfig, log: Log) -> None:
        """Read the files; a UserError if a given tokenizer is not the model's, or a file cannot be read."""
        self._config, self._log = config, log
        self._source = path_of(str(config.checkpoint))
        self._settings = read_json(file, HOLDS_SIZES) if (file := self._source / HF_CONFIG).is_file() else None
        trained = template_of_run(config.adapter)
        # If an adapter was trained in the user's own template, the exported model must use it too.
        self._own_template = None if trained in BUILTIN_TEMPLATES else text_of(Path(str(trained)), str(trained))
        self._tokenizer = self._found_tokenizer()
        self.files: dict[str, bytes] = {}
        if config.to is Format.hf:
            self._ids = self._special_ids()
            self.files = self._hf_files()
        elif config.to is Format.meta:
            self.files = self._meta_files()
        if self._tokenizer is not None and config.to is not Format.gguf:
            self._put_template(self._tokenizer.named.chat_template)

    def gguf_file(self, source: Source) -> GgufFile:
        """The weights and the tokenizer as one file; a UserError if GGUF cannot express the model."""
        if self._tokenizer is None:
            raise UserError(f"checkpoint={self._source}: it has no tokenizer, which GGUF needs: give tokenizer=FILE")
        return GgufFile(source, self._tokenizer, self._config.dtype, self._log)

    def _found_tokenizer(self) -> Tokenizer | None:
        config = self._config
        builtin = str(config.model.builtin_dir / TOKENIZER_FILES[0]) if config.model.is_builtin else None
        name = config.tokenizer or builtin or found_tokenizer(config.model, config.checkpoint)
        if name is None:
            return None
        try:
            tokenizer = Tokenizer(path_of(name), config.checkpoint)
            check_vocabulary(tokenizer, tokenizer.file, config.model, config.checkpoint)
            if self._own_template is not None:
                tokenizer.named = replace(tokenizer.named, chat_template=self._own_template)
            return tokenizer
        except UserError as error:
            if config.tokenizer is not None or config.to is Format.gguf:
                raise
            is_copied = config.to is Format.hf and not is_gguf(self._source)
            self._log(f"{error}; {'its files are copied unchanged' if is_copied else 'it is left out'}")
            return None

    def _special_ids(self) -> Json:
        """BOS and end tokens for `config.json`: the source's and the tokenizer's, or those of the released models."""
        if self._settings is not None or self._tokenizer is not None:
            return self._with_tokenizers(HF_CONFIG, self._settings or {})
        bos_id, eos_id = LLAMA_3_IDS if self._config.model.vocab_size >= LLAMA_3_VOCABULARY else LLAMA_2_IDS
        guess = f"BOS and EOS are assumed to be {bos_id} and {eos_id}, as in the released models"
        self._log(f"no tokenizer is given: {guess}; tokenizer=FILE uses its own")
        return {"bos_token_id": bos_id, "eos_token_id": eos_id}

    def _with_tokenizers(self, name: str, content: Json) -> Json:
        """The ids in a file of the source, with the tokenizer's added if missing; logs where the two disagree."""
        stored = {key: content.get(key) for key in ("bos_token_id", "eos_token_id")}
        if (tokenizer := self._tokenizer) is None:
            return stored
        ends = stored["eos_token_id"]
        ids = dict(stored)
        if tokenizer.eos_id not in (ends if isinstance(ends, list) else [ends]):
            ids["eos_token_id"] = tokenizer.eos_id if len(tokenizer.end_ids) == 1 else sorted(tokenizer.end_ids)
        if tokenizer.bos_id is not None:
            ids["bos_token_id"] = tokenizer.bos_id
        if wrong := [f"{key}={stored[key]}, now {ids[key]}" for key in ids if stored[key] not in (None, ids[key])]:
            self._log(f"{name} and the tokenizer disagree: {', '.join(wrong)}")
        return ids

    def _hf_files(self) -> dict[str, bytes]:
        """The tokenizer in the form that transformers reads, and the source's generation settings."""
        files: dict[str, bytes] = {}
        if (file := self._source / GENERATION_CONFIG).is_file():
            content = read_json(file, "how text is generated")
            ids = self._with_tokenizers(GENERATION_CONFIG, content)
            is_right = all(content.get(key) == number for key, number in ids.items())
            files[GENERATION_CONFIG] = _read(file) if is_right else _json(content | ids)
        elif self._settings is None:
            files[GENERATION_CONFIG] = _json(self._ids)
        folder = self._source if self._tokenizer is None else home_of(self._tokenizer.file)
        files |= {name: _read(folder / name) for name in HF_TOKENIZER_FILES if (folder / name).is_file()}
        if self._tokenizer is None:
            unread = self._source / TOKENIZER_FILES[0]
            return files | ({unread.name: _read(unread)} if unread.is_file() else {})
        files[_usual_name(self._tokenizer)] = read_tokenizer(self._tokenizer.file)
        is_whole = {"tokenizer.json", TOKENIZER_CONFIG} <= files.keys()
        return files if is_whole else self._made(self._tokenizer) | files

    def _meta_files(self) -> dict[str, bytes]:
        """Only the tokenizer, if any; with tokenizer.json also the settings that name its end tokens."""
        if (tokenizer := self._tokenizer) is None:
            return {}
        files = {_usual_name(tokenizer): read_tokenizer(tokenizer.file)}
        if tokenizer.is_json:
            settings = home_of(tokenizer.file) / TOKENIZER_CONFIG
            files |= {settings.name: _read(settings)} if settings.is_file() else self._made(tokenizer)
        return files

    def _put_template(self, text: str | None) -> None:
        """Make this the files' only chat template."""
        settings = json.loads(self.files.get(TOKENIZER_CONFIG, b"{}"))
        stored = self.files[CHAT_TEMPLATE].decode() if CHAT_TEMPLATE in self.files else settings.get("chat_template")
        if text is None or default_template(stored) == text:
            return
        self.files[CHAT_TEMPLATE] = text.encode()
        if settings.pop("chat_template", None) is not None:
            self.files[TOKENIZER_CONFIG] = _json(settings)

    def _made(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        made = {TOKENIZER_CONFIG: FAST_TOKENIZER if tokenizer.is_json else {}}
        try:
            made |= {} if tokenizer.is_json else tokenizer_files(tokenizer.file, self._config.model.rope_factor != 1)
        except UserError as error:
            self._log(f"{error}; transformers may split text differently")
        template = {"chat_template": text} if (text := tokenizer.named.chat_template) else {}
        made[TOKENIZER_CONFIG] = made[TOKENIZER_CONFIG] | tokenizer.special_names | template
        return {name: _json(content) for name, content in made.items()}

    def hf_config(self, model: ModelConfig, dtype: str) -> Json:
        """The content of config.json: the source's, if any, with the changed settings."""
        ours = hf_config(model, dtype, self._ids["bos_token_id"], self._ids["eos_token_id"])
        if self._settings is None:
            return ours
        left_out = {*OF_THE_SOURCE_ALONE}
        changed = {"max_position_embeddings", "tie_word_embeddings", *self._ids}
        if {*model.given} - {*NO_CHECK}:  # then any size may differ; rotary settings have one of two places
            changed, left_out = {*ours} - {"architectures", "model_type"}, left_out | {"rope_parameters"}
        content = {key: value for key, value in self._settings.items() if key not in left_out}
        content |= {key: ours[key] for key in ours if key in changed}
        content.pop("torch_dtype", None)
        return content | {"dtype" if "dtype" in self._settings else "torch_dtype": dtype}


def save_tokenizer(source: ModelSource, folder: Path, log: Log) -> None:
    """Save the tokenizer of a model that is not built in next to weights trained from it, in Hugging Face's form."""
    if source.model.is_builtin:
        return
    tokenizer = Tokenizer(source.tokenizer_file, source.checkpoint)
    # Without a checkpoint use a folder without settings: the run's own.
    checkpoint = str(folder) if source.checkpoint == "random" else source.checkpoint
    config = ConvertConfig(source.model, checkpoint, Format.hf, str(folder), tokenizer=str(source.tokenizer_file))
    files = SidecarFiles(config, log).files
    ends = [tokenizer.eos_id, *sorted(tokenizer.end_ids - {tokenizer.eos_id})]
    stored = json.loads(files.get(GENERATION_CONFIG, b"{}"))
    files[GENERATION_CONFIG] = _json(stored | {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends})
    for name, content in files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content)


def _usual_name(tokenizer: Tokenizer) -> str:
    return TOKENIZER_FILES[1 if tokenizer.is_json else 0]


def _read(file: Path) -> bytes:
    with explained(f"{file} cannot be read"):
        return file.read_bytes()


def _json(content: Json) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
