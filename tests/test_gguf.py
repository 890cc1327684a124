"""GGUF files: read as the gguf package, transformers and the models that they were made of have it, and written.

They are small, and made by the gguf package. llama.cpp is no dependency: docs/formats.md says what it made of some.
"""

import errno
import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from conftest import CHECKOUT
from gguf import GGMLQuantizationType as Kind
from helpers.checkpoints import are_equal, hf_folder, ours, peft_adapter, tensors, theirs
from helpers.converting import converted
from helpers.models import relative
from sentencepiece import sentencepiece_model_pb2
from test_tokenizer_json import MORE, random_texts
from test_tokenizer_llama3 import CORPUS, SPLIT, TEXTS, files
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ft import api, cli
from llama_ft.config import GenerateConfig, ModelConfig, UserError
from llama_ft.config.content import content_hash
from llama_ft.data.tokenizer import Tokenizer, load_tokenizer
from llama_ft.decoding.load import check_sources
from llama_ft.gguf_file import read_header
from llama_ft.model.folder import sizes_of
from llama_ft.model.gguf import read_gguf, rope_divisors

__all__ = ["converted", "files"]  # fixtures
TINY = CHECKOUT / "llama_ft" / "model" / "tiny" / "tokenizer.model"
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K", "IQ4_NL")
TOKENS = torch.randint(3, 120, (2, 100), generator=torch.Generator().manual_seed(2))
Settings = dict[str, Any]
Numbers = tuple[np.ndarray, Kind]


def write(file: Path, weights: dict[str, Numbers], settings: Settings, arch: str = "llama") -> Path:
    """A file by the package's own writer; of the keys, those of the architecture begin with ARCH."""
    writer = gguf.GGUFWriter(file, arch)
    adders = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in settings.items():
        adders.get(type(value), writer.add_array)(key.replace("ARCH", arch), value)
    for name, (numbers, kind) in weights.items():
        writer.add_tensor(name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stored(weight: Tensor, kind: str) -> Numbers:
    chosen = Kind[kind if weight.dim() > 1 else "F32"]
    return gguf.quants.quantize(weight.detach().numpy(), chosen), chosen


def settings_of(name: str) -> Settings:
    config = theirs(name).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "general.name": name,
        "ARCH.vocab_size": config.vocab_size,
        "ARCH.embedding_length": config.hidden_size,
        "ARCH.block_count": config.num_hidden_layers,
        "ARCH.feed_forward_length": config.intermediate_size,
        "ARCH.context_length": config.max_position_embeddings,
        "ARCH.attention.head_count": config.num_attention_heads,
        "ARCH.attention.head_count_kv": config.num_key_value_heads,
        "ARCH.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "ARCH.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "ARCH.rope.dimension_count" if config.model_type == "llama" else "ARCH.attention.key_length": head_dim,
    }


def weights_of(name: str, kind: str = "F32") -> dict[str, Numbers]:
    """transformers' weights by the package's names: of LLaMA wq and wk in Meta's order, of adjacent pairs."""
    model = theirs(name)
    head_dim = model.model.layers[0].self_attn.head_dim
    is_llama = model.config.model_type in ("llama", "mistral")
    order = [i // 2 + i % 2 * head_dim // 2 for i in range(head_dim)]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH["LLAMA" if is_llama else model.config.model_type.upper()], 2)
    weights = {}
    for key, weight in model.state_dict().items():
        if is_llama and key.endswith(("q_proj.weight", "k_proj.weight")):
            weight = torch.cat([head[order] for head in weight.split(head_dim)])
        if key != "lm_head.weight" or not model.config.tie_word_embeddings:
            weights[str(table.get_name(key, (".weight", ".bias")))] = stored(weight, kind)
    return weights


def model_file(folder: Path, name: str, kind: str = "F32", **more: Any) -> Path:
    """transformers' model as a file."""
    arch = theirs(name).config.model_type.replace("mistral", "llama")
    return write(folder / f"{name}.{kind}.gguf", weights_of(name, kind), settings_of(name) | more, arch)


def reference(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@torch.no_grad()
def assert_same(file: Path, model: Any) -> None:
    assert relative(ours(file)(TOKENS), model(TOKENS).logits) <= 1e-5


# Weights


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("name", ["mha", "gqa", "tied", "wide_heads"])
def test_logits_are_those_of_transformers(tmp_path, name, kind):
    file = model_file(tmp_path, name, kind)
    assert_same(file, reference(file))
    assert sizes_of(file) == sizes_of(hf_folder(name)) | {"name": f"{name}.{kind}"}


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_other_architectures(tmp_path, name):
    """Against the model: transformers' reader takes heads of Qwen 3 to be 128 wide, and cannot read Mistral's."""
    file = model_file(tmp_path, name)
    assert_same(file, theirs(name))
    if name == "qwen2":
        assert_same(file, reference(file))
    assert sizes_of(file) == sizes_of(hf_folder(name)) | {"name": f"{name}.F32"}


def test_frequencies_that_are_scaled(tmp_path):
    """Linearly, by a number; and as Llama 3.1's, by a tensor: transformers' reader takes neither."""
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert_same(model_file(tmp_path, "linear", **linear), theirs("linear"))
    with pytest.raises(UserError, match="rotary embeddings of type yarn are not supported, only linear and Ll"):
        sizes_of(model_file(tmp_path, "linear", **linear | {"llama.rope.scaling.type": "yarn"}))
    divisors = rope_divisors(ModelConfig(**sizes_of(hf_folder("llama3_1")))).numpy()
    assert (divisors.min(), divisors.max()) == (1, 8)
    for scale in (1, 1.1):
        factors = {"rope_freqs.weight": (divisors * np.float32(scale), Kind.F32)}
        file = write(tmp_path / f"{scale}.gguf", weights_of("llama3_1") | factors, settings_of("llama3_1"))
        if scale == 1:
            assert_same(file, theirs("llama3_1"))
    with pytest.raises(UserError, match=r"rope_freqs.weight is not Llama 3.1's, the only one supported"):
        sizes_of(file)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_numbers_are_those_of_the_package(tmp_path, monkeypatch, kind):
    """To the bit, from blocks of any content, read a few rows at a time."""
    monkeypatch.setattr("llama_ft.model.mapped.PIECE_ELEMENTS", 256 * 3)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (64, 256), "output_norm": (256,), "output": (64, 256)}
    layer = {f"attn_{name}": (256, 256) for name in ("q", "k", "v", "output")}
    layer |= {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"blk.0.attn_norm": (256,), "blk.0.ffn_norm": (256,)}
    generator, (block, n_bytes) = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[Kind[kind]]
    weights = {f"{name}.weight": (np.ones(shape, np.float32), Kind.F32) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if len(shape) == 2:  # bytes below 60 make no scale that is not finite
            raw = generator.integers(0, 60, (shape[0], shape[1] // block * n_bytes), np.uint8)
            weights[f"{name}.weight"] = (raw, Kind[kind])
    sizes: Settings = {"embedding_length": 256, "block_count": 1, "feed_forward_length": 512, "context_length": 32}
    sizes |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    file = write(tmp_path / "q.gguf", weights, {f"ARCH.{key}": value for key, value in sizes.items()})
    kind_name, _ = read_gguf(file)
    assert kind_name == kind
    expected = {n: torch.from_numpy(gguf.quants.dequantize(numbers, as_)) for n, (numbers, as_) in weights.items()}
    read = [parameter for _, parameter in ours(file).named_parameters()]
    for name, weight in expected.items():
        assert any(torch.equal(weight, parameter) for parameter in read), name


# Tokenizers

# As Mistral publishes it, in parts.
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
TEKKEN += r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
TEKKEN += r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-bpe": pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
    "qwen2": pre_tokenizers.Split(tokenizers.Regex(SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")), "isolated"),
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "gpt-2": None,
    "tekken": pre_tokenizers.Split(tokenizers.Regex(TEKKEN), "isolated"),
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_level(pre: str) -> tokenizers.Tokenizer:
    """A tokenizer that splits text in a published way, trained on a few words."""
    trained, split = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken"))), SPLITS[pre]
    level = pre_tokenizers.ByteLevel(False, use_regex=pre in ("smollm", "gpt-2"))
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    if pre == "qwen2":
        trained.normalizer = normalizers.NFC()
    trained.decoder = decoders.ByteLevel()
    special, alphabet = ["<|begin|>", "<|im_end|>", "<|other|>"], pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special)
    )
    return trained


def settings_of_byte_level(trained: tokenizers.Tokenizer, pre: str) -> Settings:
    """As llama.cpp's own converter has them."""
    content = json.loads(trained.to_str())
    vocabulary, special = content["model"]["vocab"], {token["content"] for token in content["added_tokens"]}
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [3 if name in special else 1 for name in names],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def settings_of_sentencepiece(file: Path) -> Settings:
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_tokenizers(tmp_path, pre):
    trained = byte_level(pre)
    read = Tokenizer(write(tmp_path / "t.gguf", {}, settings_of_byte_level(trained, pre)))
    trained.encode_special_tokens = True
    for text in TEXTS + MORE + random_texts():
        ids = trained.encode(text, add_special_tokens=False).ids
        assert read.encode(text) == ids, text
        assert read.decode(ids) == trained.decode(ids)
    assert (read.eos_id, read.end_ids, read.vocab_size) == (1, {1, 2}, trained.get_vocab_size())
    assert read.bos_id == (
        0 if pre in ("llama-bpe", "tekken") else None
    )  # llama.cpp's default, where the file does not say
    assert read.named.chat_template == TEMPLATE


@pytest.mark.parametrize("adds_bos", [True, False])
def test_whether_texts_begin_with_bos(tmp_path, adds_bos):
    settings = settings_of_byte_level(byte_level("smollm"), "smollm") | {"tokenizer.ggml.add_bos_token": adds_bos}
    assert Tokenizer(write(tmp_path / "t.gguf", {}, settings)).bos_id == (0 if adds_bos else None)


@pytest.mark.parametrize("name", ["tiny", "llama_2"])
def test_sentencepiece(request, tmp_path, name):
    file = TINY if name == "tiny" else request.getfixturevalue("test_data") / "llama2_tokenizer.model"
    read, original = Tokenizer(write(tmp_path / "t.gguf", {}, settings_of_sentencepiece(file))), Tokenizer(file)
    for text in TEXTS + MORE + random_texts():
        ids = original.encode(text, bos=True, eos=True)
        assert read.encode(text, bos=True, eos=True) == ids, text
        assert read.decode(ids) == original.decode(ids)
    assert (read.end_ids, read.vocab_size) == (original.end_ids, original.vocab_size)


def with_tokenizer(folder: Path, name: str = "tied") -> Path:
    """A model with a tokenizer of as many tokens as it has rows; the last ones mean nothing."""
    trained = byte_level("smollm")
    settings = settings_of_byte_level(trained, "smollm")
    n_rows = 340
    embedding = torch.randn(n_rows, 96, generator=torch.Generator().manual_seed(0))
    padding = n_rows - trained.get_vocab_size()
    settings["tokenizer.ggml.tokens"] += [f"[PAD{number}]" for number in range(padding)]
    settings["tokenizer.ggml.token_type"] += [5] * padding
    weights = weights_of(name) | {"token_embd.weight": (embedding.numpy(), Kind.F32)}
    return write(folder / "model.gguf", weights, settings_of(name) | {"ARCH.vocab_size": n_rows} | settings)


def test_to_hugging_face(tmp_path, converted):
    """transformers reads the folder alike: logits, tokens, the chat template and the ends."""
    file = with_tokenizer(tmp_path)
    converted(f"checkpoint={file}", "to=hf", f"output={tmp_path / 'hf'}")
    assert_same(file, AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    made, read = AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(file)
    assert all(made(text).input_ids == read.encode(text) for text in TEXTS[:-1] + MORE)
    assert made.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    assert (made.eos_token, made.bos_token) == ("<|im_end|>", "<|begin|>")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    model, tokenizer = api.load(file)
    assert tokenizer.encode("The cat sat.") == read.encode("The cat sat.")
    assert model.config.name == "model"
    first = content_hash(str(file))
    file.write_bytes(file.read_bytes() + b"\0")
    assert content_hash(str(file)) != first


# Writing


def settings_read(file: Path) -> Settings:
    """By the package's own reader."""
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def with_tiny_tokenizer(folder: Path, name: str) -> tuple[Path, Path]:
    """A model in Hugging Face's format with as many rows as the built-in tokenizer has pieces and three more."""
    model = theirs(name)
    model.resize_token_embeddings(2051)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(4))
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(TINY.read_bytes())
    return folder, folder.with_suffix(".gguf")


@pytest.mark.parametrize("dtype", ["keep", "fp32", "fp16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["tied", "qwen2"])
def test_what_is_written_is_read_alike(tmp_path, converted, name, dtype):
    """By us to the bit, by transformers to 1e-5, and with the rounding that the package has."""
    folder, file = with_tiny_tokenizer(tmp_path / name, name)
    converted(f"checkpoint={folder}", "to=gguf", f"output={file}", f"dtype={dtype}")
    assert_same(file, reference(file))
    kind = Kind[{"fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}.get(dtype, "F32")]
    read = dict(ours(file).named_parameters())
    for key, weight in ours(folder).named_parameters():
        exact = kind if weight.dim() > 1 else Kind.F32
        if "wq" in key or "wk" in key or exact is Kind.F32:
            assert exact is not Kind.F32 or torch.equal(read[key], weight), key
        else:
            expected = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), exact), exact)
            assert torch.equal(read[key], torch.from_numpy(expected)), key
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert {tensor.tensor_type for tensor in stored.values() if len(tensor.shape) == 2} == {kind}
    assert {tensor.tensor_type for tensor in stored.values() if len(tensor.shape) == 1} == {Kind.F32}
    file_types = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # of llama.cpp's llama_ftype
    assert settings_read(file)["general.file_type"] == file_types[kind.name]
    # A second time it is the same.
    converted(f"checkpoint={file}", "to=gguf", f"output={tmp_path / 'again.gguf'}", f"dtype={dtype}")
    again = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "again.gguf").tensors}
    assert again.keys() == stored.keys()
    if dtype != "q8_0":
        assert all(np.array_equal(again[key], stored[key].data) for key in stored)


def test_metadata_that_llama_cpp_needs(tmp_path, converted):
    folder, file = with_tiny_tokenizer(tmp_path / "gqa", "gqa")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    converted(f"checkpoint={folder}", "to=gguf", f"output={file}")
    read = settings_read(file)
    expected = {key.replace("ARCH", "llama"): value for key, value in settings_of("gqa").items()}
    expected |= {"llama.vocab_size": 2051, "general.architecture": "llama", "general.type": "model"}
    expected |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": True}
    expected |= {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.bos_token_id": 1}
    expected |= settings_of_sentencepiece(TINY) | {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.pre": "default"}
    for key in ("tokens", "scores", "token_type"):
        expected[f"tokenizer.ggml.{key}"] += {"tokens": ["[PAD2048]", "[PAD2049]", "[PAD2050]"]}.get(key, [])
        expected[f"tokenizer.ggml.{key}"] += {"scores": [-1000.0] * 3, "token_type": [5] * 3}.get(key, [])
    for key, value in expected.items():
        assert read[key] == (pytest.approx(value) if isinstance(value, float) else value), key


@pytest.mark.parametrize("name", ["llama3_1", "linear", "qwen3", "mistral"])
def test_models_of_all_kinds_come_back(tmp_path, converted, name):
    folder, file = with_tiny_tokenizer(tmp_path / name, name)
    converted(f"checkpoint={folder}", "to=gguf", f"output={file}")
    assert sizes_of(file) == sizes_of(folder)
    converted(f"checkpoint={file}", "to=hf", f"output={tmp_path / 'hf'}")
    before, after = tensors(folder), tensors(tmp_path / "hf")
    assert are_equal(before, after)
    assert_same(file, AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("kind", ["json", "model", "llama_2", *SPLITS])
def test_tokenizers_come_back(tmp_path, converted, files, kind):
    """Meta's, Hugging Face's, and LLaMA-2's as Hugging Face's."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if kind in ("json", "model"):
        (folder / f"tokenizer.{kind}").write_bytes(files.file(kind).read_bytes())
    elif kind == "llama_2":
        from llama_ft.data.tokenizer_json import tokenizer_files

        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_files(TINY, False)["tokenizer.json"]))
    else:
        byte_level(kind).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (found,) = folder.glob("tokenizer.[jm]*")
    model = theirs("mha")
    model.resize_token_embeddings(Tokenizer(found).vocab_size)
    model.save_pretrained(folder)
    original = Tokenizer(found)
    converted(f"checkpoint={folder}", "to=gguf", f"output={tmp_path / 'f.gguf'}")
    read = Tokenizer(tmp_path / "f.gguf")
    for text in TEXTS[:-1] + MORE + random_texts():
        assert read.encode(text, bos=True, eos=True) == original.encode(text, bos=True, eos=True), text
    assert (read.bos_id, read.end_ids, read.vocab_size) == (original.bos_id, original.end_ids, original.vocab_size)


def test_an_adapter_is_merged(tmp_path, converted):
    folder, file = with_tiny_tokenizer(tmp_path / "gqa", "gqa")
    adapted = peft_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter", "default")
    converted(f"checkpoint={folder}", f"adapter={tmp_path / 'adapter'}", "to=gguf", f"output={file}")
    assert_same(file, adapted)


def test_rows_that_are_no_whole_blocks(tmp_path, converted):
    printed = converted("model=tiny", "to=gguf", f"output={tmp_path / 'a.gguf'}", "dtype=q8_0")
    assert "written as F16" not in printed
    model = theirs("mha")
    model.config.intermediate_size = 100
    narrow = type(model)(model.config)
    narrow.resize_token_embeddings(2048)
    narrow.save_pretrained(tmp_path / "narrow")
    arguments = [f"checkpoint={tmp_path / 'narrow'}", f"tokenizer={TINY}", "to=gguf", "dtype=q8_0"]
    printed = converted(*arguments, f"output={tmp_path / 'b.gguf'}")
    assert "2 weights are written as F16: their rows are not multiples of 32, as Q8_0 needs" in printed
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == (Kind.F16, Kind.Q8_0)
    assert_same(tmp_path / "b.gguf", reference(tmp_path / "b.gguf"))


# What goes wrong


def damaged(content: bytes, kind: str) -> bytes:
    return {
        "empty": b"",
        "another": b"PK\3\4" + content,
        "big-endian": content[:4] + struct.pack(">I", 3) + content[8:],
        "version 1": content[:4] + struct.pack("<I", 1) + content[8:],
        "header": content[:600],
        "counts": content[:8] + struct.pack("<Q", 2**60) + content[16:],
        "cut": content[:-1000],
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is not a GGUF file, or is damaged: it does not begin with GGUF"),
        ("another", "is not a GGUF file, or is damaged: it does not begin with GGUF"),
        ("big-endian", "is big-endian, or of an unsupported version: GGUF is read in versions 2 and 3"),
        ("version 1", "is big-endian, or of an unsupported version: GGUF is read in versions 2 and 3"),
        ("header", "is damaged, or was not copied completely: its header cannot be read"),
        ("counts", "is damaged, or was not copied completely: its header cannot be read"),
        ("cut", "was not downloaded or copied completely: "),
        ("pointer", "git lfs pull fetches it"),
    ],
)
def test_damaged_files_are_refused(tmp_path, kind, message):
    file = model_file(tmp_path, "gqa")
    file.write_bytes(damaged(file.read_bytes(), kind))
    with pytest.raises(UserError) as caught:
        ours(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"general.architecture": "gemma"}, "the architecture gemma is not supported, it must be llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"llama.rope.dimension_count": 8}, "does not fit"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length=8 is not supported, heads are 16 wide"),
        ({"split.count": 2}, "is one of 2 parts: merge them with llama.cpp's llama-gguf-split --merge"),
        ({"llama.block_count": "two"}, "does not give the model's n_layers as a number"),
        ({"llama.attention.head_count_kv": [3, 3]}, "does not give the model's n_kv_heads as a number"),
    ],
)
def test_models_that_are_not_supported(tmp_path, settings, message):
    arch = settings.pop("general.architecture", "llama")
    file = write(tmp_path / "m.gguf", weights_of("gqa"), settings_of("gqa") | settings, arch)
    with pytest.raises(UserError) as caught:
        ours(file)
    assert message in str(caught.value)


def test_tensors_that_are_not_supported(tmp_path):
    integers = {"output.weight": (np.zeros((120, 96), np.int32), Kind.I32)}
    with pytest.raises(UserError, match=r"output.weight is stored as I32, which is not supported"):
        ours(write(tmp_path / "a.gguf", weights_of("gqa") | integers, settings_of("gqa")))
    short = {"output_norm.weight": (np.zeros(102, np.uint8), Kind.Q8_0)}
    with pytest.raises(UserError, match=r"output_norm.weight, \[96\], is not made of blocks of 32 \(Q8_0\)"):
        ours(write(tmp_path / "d.gguf", weights_of("gqa") | short, settings_of("gqa")))
    unknown = {"blk.0.attn_q.bias": (np.zeros(96, np.float32), Kind.F32)}
    with pytest.raises(UserError, match=r"1 tensors are not the model's, such as GGUF F32's blk.0.attn_q.bias"):
        ours(write(tmp_path / "b.gguf", weights_of("gqa") | unknown, settings_of("gqa")))
    weights = weights_of("gqa")
    del weights["blk.1.ffn_up.weight"]
    with pytest.raises(UserError, match=r"1 tensors are missing, such as blk.1.ffn_up.weight"):
        ours(write(tmp_path / "c.gguf", weights, settings_of("gqa")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer.ggml.pre": "viking"}, "it splits text by the rule viking: supported are llama-bpe, qwen2, "),
        ({"tokenizer.ggml.model": "bert"}, "its tokenizer is of type bert, but only gpt2 and llama are supported"),
        ({"tokenizer.ggml.model": ""}, "it has no tokenizer; give tokenizer=FILE"),
        ({"tokenizer.ggml.token_type": [1]}, "cannot be read"),
        ({"tokenizer.ggml.merges": ["a b", "zz yy"]}, "is not a SentencePiece model, nor a tokenizer.json"),
    ],
)
def test_tokenizers_that_are_not_supported(tmp_path, settings, message):
    content = settings_of_byte_level(byte_level("smollm"), "smollm") | settings
    with pytest.raises(UserError) as caught:
        Tokenizer(write(tmp_path / "t.gguf", {}, content))
    assert message in str(caught.value)


def test_commands_take_a_file_as_they_take_a_folder(tmp_path):
    file = with_tokenizer(tmp_path)
    arguments = ["model=from_checkpoint", f"checkpoint={file}", f"base={file}", "prompt=a", "compare=true"]
    config = cli.composed_config("generate", arguments, GenerateConfig)
    assert (config.model.name, config.model.vocab_size, config.tokenizer) == ("model", 340, str(file))
    check_sources(config)
    assert load_tokenizer(config).eos_id == 1  # with fewer pieces than the model has rows
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"model.gguf was not downloaded or copied completely: output_norm.weight s"):
        check_sources(config)


def test_another_tokenizer_can_be_given(tmp_path):
    """Where the file's own is not read; the file still says which token ends a text."""
    other = settings_of_byte_level(byte_level("smollm"), "smollm") | {"tokenizer.ggml.model": "bert"}
    file = write(tmp_path / "t.gguf", {}, other | {"tokenizer.ggml.eot_token_id": 5})
    given = Tokenizer(TINY, str(file))
    assert (given.eos_id, given.end_ids) == (2, {2, 5})
    assert Tokenizer(TINY, str(write(tmp_path / "none.gguf", {}, {}))).end_ids == {2}


def test_what_cannot_be_written(tmp_path, converted, monkeypatch):
    def refused(*arguments: object) -> str:
        with pytest.raises(UserError) as caught:
            converted(*arguments)
        return str(caught.value)

    folder, file = with_tiny_tokenizer(tmp_path / "gqa", "gqa")
    to = [f"checkpoint={folder}", "to=gguf", f"output={file}"]
    assert "shards=2 is not for to=gguf" in refused(*to, "shards=2")
    assert "dtype=q8_0 is for to=gguf" in refused(f"checkpoint={folder}", "to=hf", "output=x", "dtype=q8_0")
    assert "a GGUF file's name ends in .gguf" in refused(f"checkpoint={folder}", "to=gguf", "output=x")
    assert "a GGUF file's name ends in .gguf" in refused(f"checkpoint={folder}", "to=hf", "output=x.gguf")
    without = [f"checkpoint={hf_folder('gqa')}", "to=gguf", f"output={file}"]
    assert "it has no tokenizer, which GGUF needs: give tokenizer=FILE" in refused(*without)
    strange = byte_level("smollm")
    strange.pre_tokenizer = pre_tokenizers.ByteLevel(True)
    model = theirs("mha")
    model.resize_token_embeddings(strange.get_vocab_size())
    model.save_pretrained(tmp_path / "strange")
    strange.save(str(tmp_path / "strange" / "tokenizer.json"))
    (tmp_path / "strange" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert "splits text by a rule that has no name in GGUF" in refused(f"checkpoint={tmp_path / 'strange'}", *to[1:])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("llama_ft.exporting.gguf.as_bytes", full)
        assert f"output={file} cannot be written: No space left on device" in refused(*to)
    assert not [*tmp_path.glob("*.gguf"), *tmp_path.glob(".*.tmp")]
    converted(*to)
    assert "exists already and is not overwritten" in refused(*to)


def test_without_the_package(tmp_path, monkeypatch):
    file = model_file(tmp_path, "gqa")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'llama_ft\[gguf\]'"):
        ours(file)
    assert read_header(file).metadata["general.name"] == "gqa"
