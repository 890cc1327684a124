"""Checkpoints in the formats of Hugging Face, Meta and our own: what is read, what it costs, and what is refused."""

import io
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, environment
from helpers.checkpoints import (
    MODELS,
    WRITERS,
    assert_same,
    config_of,
    hf_folder,
    meta_weights,
    ours,
    theirs,
    write_hf,
    write_meta,
)
from helpers.models import CPU, change_json
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

from llama_ft.config import ModelConfig, UserError
from llama_ft.files import INDEX_FILE, WEIGHTS_FILE
from llama_ft.model import mapped
from llama_ft.model.folder import sizes_of
from llama_ft.model.formats import hf_name
from llama_ft.model.mapped import StoredTensor
from llama_ft.model.sizes import hf_sizes, meta_sizes
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import build, load_model, save_tensors

META_FILE = "consolidated.00.pth"
EMBEDDINGS = "tok_embeddings.weight"


def load(folder: Path, config: ModelConfig | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(config or config_of("gqa"), str(folder), CPU, dtype)


def assert_weights_equal(model: Transformer, name: str = "gqa") -> None:
    expected = meta_weights(name)
    assert expected.keys() == model.state_dict().keys()
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, expected[key].to(weight.dtype)), key


# What is read


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_hf_has_transformers_logits_and_text(name):
    assert_same(ours(hf_folder(name)), theirs(name))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_holds_the_same_weights(tmp_path, kind):
    folder = WRITERS[kind](tmp_path)
    assert len([*folder.glob("*.safetensors"), *folder.glob("*.pth")]) == {"sharded": 5, "shards": 3}.get(kind, 1)
    assert_weights_equal(load(folder))


@pytest.mark.parametrize("by_rows", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize(
    ("name", "n_shards", "rope"), [("mha", 1, True), ("gqa", 1, False), ("gqa", 3, True), ("mha", 6, False)]
)
def test_a_checkpoint_of_meta_has_transformers_logits(tmp_path, name, n_shards, rope, by_rows):
    model = load(write_meta(name, tmp_path, n_shards, by_rows, rope), config_of(name)).eval()
    assert_weights_equal(model, name)
    assert_same(model, theirs(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_in_another_dtype_are_rounded_once(stored, dtype):
    folder = hf_folder("gqa", stored)
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    loaded = load(folder, dtype=dtype).state_dict()
    assert all(
        torch.equal(loaded[name], expected[hf_name(name)]) for name in loaded if "wq" not in name and "wk" not in name
    )


def test_a_config_of_2023_is_read(tmp_path):
    folder = write_hf("mha", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "dtype"):
        config.pop(key, None)
    old = {"rope_theta": 20000.0, "rope_scaling": None, "pretraining_tp": 1, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | old))
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    save_file(load_file(folder / WEIGHTS_FILE) | tables, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    assert_same(ours(folder), theirs("mha"))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_its_types_default(tmp_path, kind):
    said = {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 64}
    said |= {"model_type": kind, "vocab_size": 8, "rope_theta": 5e5}
    said |= {"sliding_window": None} if kind == "mistral" else {}
    (tmp_path / "config.json").write_text(json.dumps(said))
    expected, sizes = AutoConfig.for_model(**said), hf_sizes(tmp_path / "config.json")
    assert sizes["n_kv_heads"] == expected.num_key_value_heads
    assert sizes["max_seq_len"] == expected.max_position_embeddings
    assert sizes["norm_eps"] == expected.rms_norm_eps
    assert sizes["head_size"] == (128 if kind == "qwen3" else None)


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path):
    write_hf("gqa", tmp_path)
    (tmp_path / INDEX_FILE).write_text("{}")
    assert_weights_equal(load(tmp_path))


def test_a_checkpoint_of_other_writers_is_read(tmp_path):
    """Parameters, views of larger tensors, state dicts, tensors of a GPU, archives packed again."""
    file = write_meta("gqa", tmp_path) / META_FILE
    weights = dict(meta_weights("gqa"))
    holder = torch.nn.Module()
    holder.register_parameter("norm", torch.nn.Parameter(weights.pop("norm.weight").clone()))
    state = holder.state_dict(keep_vars=True)  # an OrderedDict with an attribute
    state["norm.weight"] = state.pop("norm")
    output = weights.pop("output.weight")
    torch.save(state | weights | {"output.weight": torch.cat((output, output))[120:]}, file)
    assert_weights_equal(load(tmp_path))
    with zipfile.ZipFile(file) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    on_gpu = pickled.replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0")
    file.write_bytes(repacked(file.read_bytes(), zipfile.ZIP_STORED, {"data.pkl": on_gpu}))
    assert_weights_equal(load(tmp_path))


RELEASED: dict[str, dict[str, Any]] = {  # their params.json, and TinyLlama's config.json
    "llama2_7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5},
    "llama2_13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-5},
    "llama2_70b": {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8}
    | {"n_layers": 80, "norm_eps": 1e-5},
    "tinyllama_1b": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}
    | {"intermediate_size": 5632, "vocab_size": 32000, "rms_norm_eps": 1e-05, "rope_theta": 1e4, "rope_scaling": None},
}


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_of_the_released_models(tmp_path, name):
    file = tmp_path / "file.json"
    file.write_text(json.dumps({"vocab_size": -1} | RELEASED[name]))
    sizes = hf_sizes(file) if "hidden_size" in RELEASED[name] else meta_sizes(file, 8.0)
    preset = ModelConfig(**OmegaConf.load(CHECKOUT / "conf" / "model" / f"{name}.yaml"))
    assert {"dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "norm_eps", "rope_theta"} <= sizes.keys()
    assert {key: value for key, value in sizes.items() if key != "max_seq_len"} == {
        key: getattr(preset, key) for key in sizes if key != "max_seq_len"
    }


@pytest.mark.parametrize("n_elements", [1, 175, 1250])
@pytest.mark.parametrize("kind", ["sharded", "meta", "own"])
def test_pieces_make_up_the_whole(tmp_path, monkeypatch, kind, n_elements):
    folder = WRITERS[kind](tmp_path)
    monkeypatch.setattr(mapped, "PIECE_ELEMENTS", n_elements)
    pieces, read = [], StoredTensor.pieces
    monkeypatch.setattr(StoredTensor, "pieces", lambda *args: (pieces.append(piece) or piece for piece in read(*args)))
    assert_weights_equal(load(folder))
    assert len(pieces) > 100
    # No more than asked for, unless one head's rows of 96 elements are more, which the permutation needs together.
    assert max(rows.numel() for _, rows in pieces) <= max(n_elements, 16 * 96)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_pieces_make_up_biases_and_norms(monkeypatch, name):
    whole = ours(hf_folder(name)).state_dict()
    monkeypatch.setattr(mapped, "PIECE_ELEMENTS", 7)
    assert all(torch.equal(weight, whole[key]) for key, weight in ours(hf_folder(name)).state_dict().items())


def test_what_is_read_is_logged():
    lines: list[str] = []
    folder = hf_folder("gqa", sharded=True)
    load_model(config_of("gqa"), str(folder), CPU, torch.float32, log=lines.append)
    n_bytes = 4 * sum(weight.numel() for weight in meta_weights("gqa").values())
    assert lines == [f"weights: {n_bytes / 2**20:.0f} MiB from {folder} (Hugging Face, 5 files)"]


# What it costs

LOADING = """
import json, resource, sys
from pathlib import Path
import torch
from llama_ft.config import ModelConfig
from llama_ft.model.weights import load_model

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

folder, config = sys.argv[1], ModelConfig(**json.loads(sys.argv[2]))
load_model(ModelConfig(name="small", dim=64, n_layers=1, ffn_dim=96), "random", torch.device("cpu"), torch.float32)
n_bytes = int(sys.argv[3])
limit = status("VmData") + int(1.3 * n_bytes)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = status("VmRSS")
model = load_model(config, folder, torch.device("cpu"), torch.float32)
growth = status("VmHWM") - before
found = {name: [w.min().item(), w.max().item()] for name, w in model.named_parameters()}
print(json.dumps({"growth": growth, "found": found}))
"""


def write_large(folder: Path, kind: str, config: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint in which each weight is filled with a number of its own, so that the layout of rows is any."""
    shapes = {name: parameter.shape for name, parameter in build(config).named_parameters()}
    weights = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}
    if kind == "own":
        save_tensors(weights, folder / WEIGHTS_FILE, config)
    elif kind == "meta":
        torch.save(weights, folder / META_FILE)
        derived = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "vocab_size": -1}
        (folder / "params.json").write_text(json.dumps(derived))
    else:
        weight_map = {}
        for number in range(3):
            part = {hf_name(name): weights[name] for name in list(weights)[number::3]}
            save_file(part, folder / f"model-{number}.safetensors")
            weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        sizes = {"hidden_size": config.dim, "num_hidden_layers": config.n_layers, "vocab_size": config.vocab_size}
        sizes |= {"num_attention_heads": config.n_heads, "intermediate_size": config.ffn_dim, "rms_norm_eps": 1e-5}
        (folder / "config.json").write_text(json.dumps(sizes))
    return weights


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["sharded", "meta", "own"])
def test_loading_needs_the_model_and_a_tenth_at_most(tmp_path, kind):
    config = ModelConfig(name="large", dim=1024, n_layers=4, n_heads=8, n_kv_heads=8, ffn_dim=2816, vocab_size=6000)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:  # pytest would keep 250 MiB
        weights = write_large(Path(folder), kind, config)
        expected = {name: [weight[0].max().item()] * 2 for name, weight in weights.items()}
        n_bytes = sum(weight.nbytes for weight in weights.values())
        del weights
        command = [sys.executable, "-c", LOADING, folder, json.dumps(asdict(config)), str(n_bytes)]
        child = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True, timeout=120
        )
    result = json.loads(child.stdout)
    assert n_bytes > 240e6
    assert result["found"] == expected
    assert n_bytes <= result["growth"] <= 1.1 * n_bytes


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = tmp_path / WEIGHTS_FILE
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match=rf"{re.escape(str(file))} \(1 MiB\) cannot be written: .+"):
            save_tensors(meta_weights("gqa"), file, config_of("gqa"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


# What is refused


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a checkpoint to be damaged."""
    return lambda kind: WRITERS.get(kind, partial(write_hf, kind))(tmp_path / kind)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message of the UserError that loading ends in, before a tensor is read."""

    def message(folder: Path, config: ModelConfig | None = None) -> str:
        monkeypatch.setattr(StoredTensor, "pieces", lambda *_: pytest.fail("a tensor is read"))
        with pytest.raises(UserError) as caught:
            load(folder, config)
        assert str(folder) in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 2
        return str(caught.value)

    return message


def test_an_index_may_list_what_is_not_needed(tmp_path):
    """A tied output, rotary tables, a buffer of others: transformers does not miss them either."""
    folder = write_hf("tied", tmp_path, sharded=True)
    index = json.loads((folder / INDEX_FILE).read_text())
    for name in ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.other"):
        index["weight_map"][name] = max(index["weight_map"].values())
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert_same(ours(folder), LlamaForCausalLM.from_pretrained(folder).eval())


def test_numbers_that_fp32_rounds_are_the_same_size(tmp_path):
    folder = write_hf("gqa", tmp_path)
    for key, value in (("rms_norm_eps", 9.999999747378752e-05), ("rope_theta", 20000.001953125)):
        change_json(folder / "config.json", **{key: value})
        load(folder)
    save_tensors(meta_weights("gqa"), folder / WEIGHTS_FILE, replace(config_of("gqa"), norm_eps=9.9999997e-05))
    load(folder)


@pytest.mark.parametrize("kind", ["hf", "meta", "own"])
def test_sizes_that_are_given_win(copy_of, kind):
    given = replace(config_of("gqa"), rope_theta=30000.0, norm_eps=1e-3, given=["rope_theta", "norm_eps"])
    model = load(copy_of(kind), given)
    assert_weights_equal(model)
    assert (model.config.rope_theta, model.config.norm_eps) == (30000.0, 1e-3)


def test_weights_without_numbers_are_refused(copy_of, refusal):
    file = copy_of("hf") / WEIGHTS_FILE
    for belongs in ("proj", "norm"):  # as DeepSpeed ZeRO-3 leaves them
        weights = load_file(hf_folder("gqa") / WEIGHTS_FILE)
        save_file({name: torch.empty(0) if belongs in name else weights[name] for name in weights}, file)
        assert "is [0], but should be [" in (message := refusal(file.parent))
        assert message.endswith("; it is empty, as when DeepSpeed ZeRO-3 saves a model without gathering its weights")


def test_folders_without_weights_are_refused(tmp_path, refusal):
    assert "there is no such folder" in refusal(tmp_path / "missing")
    assert "there are no weights in it" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is not read: convert it to safetensors" in refusal(tmp_path)
    assert "it is a file: give the folder" in refusal(tmp_path / "pytorch_model.bin")
    (gguf := tmp_path / "llama.gguf").touch()
    assert f"; give a GGUF file by its name: checkpoint={gguf}" in refusal(tmp_path)
    with pytest.raises(UserError, match="; give a GGUF file by its name: checkpoint="):
        sizes_of(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "config.json", INDEX_FILE, META_FILE, "params.json"])
def test_files_that_cannot_be_read_are_refused(copy_of, refusal, monkeypatch, name):
    kind = {INDEX_FILE: "sharded", META_FILE: "meta", "params.json": "meta"}.get(name, "hf")
    folder, opened = copy_of(kind), Path.open

    def open_or_deny(path: Path, *args: Any, **kwargs: Any) -> Any:  # since root may read any file
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_or_deny)
    assert f"{folder / name} cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("hf", "hidden_size", 128, "model.dim is 96 but the file has 128"),
        ("hf", "num_hidden_layers", 4, "model.n_layers is 2 but the file has 4"),
        ("hf", "num_attention_heads", 8, "model.n_heads is 6 but the file has 8"),
        ("hf", "num_key_value_heads", None, "model.n_kv_heads is 3 but the file has 6"),
        ("hf", "intermediate_size", 128, "model.ffn_dim is 192 but the file has 128"),
        ("hf", "vocab_size", 105, "model.vocab_size is 120 but the file has 105"),
        ("hf", "rms_norm_eps", None, "model.norm_eps is 0.0001 but the file has 1e-06"),
        ("hf", "rope_parameters", {"rope_theta": 1e4, "rope_type": "default"}, "is 20000.0 but the file has 10000"),
        ("hf", "rope_parameters", {"rope_type": "linear", "factor": 2.0}, "rope_factor is 1.0 but the file has 2.0"),
        ("hf", "rope_parameters", {"rope_type": "llama3", "factor": 8.0}, "does not give the model's rope_low_freq"),
        ("hf", "rope_parameters", {"type": "dynamic", "factor": 8.0}, "of type dynamic are not supported, only"),
        ("hf", "rope_parameters", "default", "must be a JSON object"),
        ("hf", "model_type", "mixtral", "mixtral is not supported, it must be llama, mistral, qwen2 or qwen3"),
        ("hf", "model_type", "mistral", "sliding_window=4096 is not supported in mistral, it must be null"),
        ("hf", "model_type", "qwen2", "model.qkv_bias is False but the file has True"),
        ("hf", "model_type", "qwen3", "model.qk_norm is False but the file has True"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window=True is not supported in qwen2, it must be False"),
        ("qwen3", "attention_bias", True, "attention_bias=True is not supported in qwen3, it must be False"),
        ("hf", "partial_rotary_factor", 0.5, "partial_rotary_factor=0.5 is not supported, it must be 1"),
        ("hf", "tie_word_embeddings", True, "model.tie_word_embeddings is False but the file has True"),
        ("hf", "attention_bias", True, "attention_bias=True is not supported"),
        ("hf", "hidden_act", "gelu", "hidden_act=gelu is not supported"),
        ("hf", "hidden_size", "64", "does not give the model's dim as a number"),
        ("meta", "dim", 128, "model.dim is 96 but the file has 128"),
        ("meta", "n_layers", 4, "model.n_layers is 2 but the file has 4"),
        ("meta", "n_heads", 8, "model.n_heads is 6 but the file has 8"),
        ("meta", "n_kv_heads", None, "model.n_kv_heads is 3 but the file has 6"),
        ("meta", "multiple_of", 256, "model.ffn_dim is 192 but the file has 256"),
        ("meta", "ffn_dim_multiplier", None, "model.ffn_dim is 192 but the file has 256"),
        ("meta", "norm_eps", 1e-6, "model.norm_eps is 0.0001 but the file has 1e-06"),
        ("meta", "rope_theta", None, "model.rope_theta is 20000.0 but the file has 10000.0"),
        ("meta", "vocab_size", 105, "model.vocab_size is 120 but the file has 105"),
        ("meta", "use_scaled_rope", True, "model.rope_factor is 1.0 but the file has 8.0"),
    ],
)
def test_sizes_of_another_model_are_refused(copy_of, refusal, kind, key, value, message):
    folder = copy_of(kind)
    change_json(folder / ("params.json" if kind == "meta" else "config.json"), **{key: value})
    assert message in refusal(folder)


@pytest.mark.parametrize(("kind", "name"), [("hf", "config.json"), ("meta", "params.json"), ("sharded", INDEX_FILE)])
def test_broken_json_is_refused(copy_of, refusal, kind, name):
    folder = copy_of(kind)
    for content in ("{", "", "[]"):
        (folder / name).write_text(content)
        assert name in refusal(folder)
    (folder / name).unlink()
    assert ("there are no weights" if name == INDEX_FILE else f"{name} cannot be read (No such file") in refusal(folder)


def test_another_vocabulary_is_refused(copy_of, refusal):
    other = replace(config_of("gqa"), vocab_size=105)
    for kind in ("hf", "sharded", "own"):
        assert "model.vocab_size is 105 but the file has 120" in refusal(copy_of(kind), other)
    assert "tok_embeddings.weight is [120, 96], but should be [105, 96]" in refusal(copy_of("meta"), other)


def test_own_weights_of_another_model_are_refused(tmp_path, refusal):
    """Of the same shapes, of damaged sizes, and of other shapes than their own sizes say."""
    file, weights = tmp_path / WEIGHTS_FILE, meta_weights("gqa")
    save_tensors(weights, file, replace(config_of("gqa"), n_heads=12, n_kv_heads=6))
    assert "model.n_heads is 6 but the file has 12, model.n_kv_heads is 3 but the file has 6" in refusal(tmp_path)
    for sizes in ("{", "[]", '{"n_heds": 4}'):
        save_file(weights, file, metadata={"llama_ft.model": sizes})
        assert f"{file} cannot be read: " in refusal(tmp_path)
    save_tensors(meta_weights("mha"), file, config_of("gqa"))
    assert "layers.0.attention.wk.weight is [96, 96], but should be [48, 96]" in refusal(tmp_path)


def test_sizes_of_files_from_before_version_0_2_are_read(tmp_path):
    sizes = config_of("gqa").sizes
    sizes["context"] = sizes.pop("max_seq_len")
    save_file(meta_weights("gqa"), tmp_path / WEIGHTS_FILE, metadata={"llama_ft.model": json.dumps(sizes)})
    assert_weights_equal(ours(tmp_path))


def test_weights_of_unknown_layout_are_refused(copy_of, refusal):
    """Meta's names, but nothing that says the sizes, or something that promises Hugging Face's layout."""
    folder = copy_of("hf")
    save_file(meta_weights("gqa"), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    assert "21 tensors are missing, such as model.embed_tokens.weight" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in refusal(folder)


WQ = "model.layers.1.self_attn.q_proj.weight"


def with_header(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A safetensors file with another header."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[end:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-100], "it was not downloaded or copied completely"),
        (lambda b: b + b"x", "it is damaged"),
        (lambda b: b[:200], "its header cannot be read"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull fetches it"),
        (lambda b: b"PK\3\4" + b, "its header cannot be read"),
        (lambda b: b"<html>not found", "is not a safetensors file"),
        (lambda b: b"", "is empty"),
        (lambda b: with_header(b, lambda h: h[WQ].update(shape=[90, 96])), "36,864 bytes, but its shape is [90, 96]"),
        (lambda b: with_header(b, lambda h: h[WQ].update(shape=[48, 192])), "is [48, 192], but should be [96, 96]"),
        (lambda b: with_header(b, lambda h: h[WQ].update(dtype="I8")), f"{WQ} is stored as I8; only F64, F32, F16"),
        (lambda b: with_header(b, lambda h: h.update(more=h.pop(WQ))), f"1 tensors are missing, such as {WQ}"),
    ],
)
def test_damaged_safetensors_are_refused(copy_of, refusal, damage, message):
    file = copy_of("hf") / WEIGHTS_FILE
    file.write_bytes(damage(file.read_bytes()))
    assert message in refusal(file.parent)


def test_an_index_that_does_not_fit_is_refused(copy_of, refusal):
    folder = copy_of("sharded")
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    files = sorted(set(index.values()))
    elsewhere = next(file for file in files if file != index[WQ])

    def refused(weight_map: object) -> str:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        return refusal(folder)

    assert "must hold a weight_map" in refused(None)
    assert "to files in its own folder" in refused(index | {WQ: f"../{files[0]}"})
    assert "1 of 6 files are missing: x" in refused(index | {WQ: "x"})
    assert f"{elsewhere} does not hold {WQ}" in refused(index | {WQ: elsewhere})
    (folder / files[1]).unlink()
    assert f"1 of {len(files)} files are missing: {files[1]}" in refused(index)


def test_missing_and_doubled_shards_of_meta_are_refused(copy_of, refusal):
    folder = copy_of("shards")
    hidden = (folder / "consolidated.01.pth").rename(folder / "hidden")
    assert "consolidated.01.pth is missing; found: consolidated.00.pth, consolidated.02.pth" in refusal(folder)
    hidden.rename(folder / "consolidated.01.pth")
    (folder / "consolidated.02.pth").unlink()  # which the shapes alone can tell
    assert "2 of 3 shards were found, the others are missing" in refusal(folder)
    folder = copy_of("meta")
    shutil.copy(folder / META_FILE, folder / "consolidated.01.pth")
    assert f"{EMBEDDINGS} is [120, 96] and [120, 96], but should be [120, 96]" in refusal(folder)


class Code:
    """Something whose unpickling touches a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_code_in_a_pth_is_refused_and_not_run(copy_of, refusal, tmp_path):
    folder = copy_of("meta")
    torch.save(meta_weights("gqa") | {"rope.freqs": Code(tmp_path / "run")}, folder / META_FILE)
    assert "it holds posix.system, but may only hold tensors of F64, F32, F16, BF16" in refusal(folder)
    assert not (tmp_path / "run").exists()


NORM = {"norm.weight": torch.ones(96)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "it must hold tensors by name"),
        ({"model": NORM}, "it must hold tensors by name"),
        ({}, "21 tensors are missing, such as tok_embeddings.weight"),
        ({"norm.weight": torch.ones(96, dtype=torch.int32)}, "it holds torch.IntStorage, but may only hold"),
        ({"norm.weight": torch.ones(96).to(torch.float8_e4m3fn)}, "_rebuild_tensor_v3, but may only hold"),
        ({"norm.weight": torch.ones(96, 2)[:, 0]}, "a tensor [96] that is not contiguous"),
    ],
)
def test_pth_with_other_content_is_refused(copy_of, refusal, content, message):
    folder = copy_of("meta")
    torch.save(content, folder / META_FILE)
    assert message in refusal(folder)


def repacked(content: bytes, compression: int, changed: dict[str, bytes | None]) -> bytes:
    """A zip file written again with other records, by the names below its one folder; None leaves one out."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w", compression) as new:
        for name in old.namelist():
            record = changed.get(name.split("/", 1)[1], old.read(name))
            if record is not None:
                new.writestr(name, record)
    return written.getvalue()


def of_old_pytorch(_: bytes) -> bytes:
    torch.save(NORM, written := io.BytesIO(), _use_new_zipfile_serialization=False)
    return written.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "is damaged or cut short"),
        (lambda b: b[:-100], "is damaged or cut short"),
        (lambda b: b"<html>not found", "is not in PyTorch's zip format"),
        (of_old_pytorch, "was saved before PyTorch 1.6"),
        (lambda b: b"", "is empty"),
        (lambda b: repacked(b, zipfile.ZIP_DEFLATED, {}), "as torch.save writes files"),
        (lambda b: repacked(b, zipfile.ZIP_DEFLATED, {"data.pkl": bytes(2**27)}), "as torch.save writes files"),
        (lambda b: repacked(b, zipfile.ZIP_STORED, {"byteorder": b"big"}), "as torch.save writes files"),
        (lambda b: repacked(b, zipfile.ZIP_STORED, {"data.pkl": None}), "as torch.save writes files"),
        (lambda b: repacked(b, zipfile.ZIP_STORED, {"data/3": None}), "data/3' in the archive"),
        (lambda b: repacked(b, zipfile.ZIP_STORED, {"data/3": b"few"}), "reaches beyond its data"),
    ],
)
def test_damaged_pth_is_refused(copy_of, refusal, damage, message):
    file = copy_of("meta") / META_FILE
    file.write_bytes(damage(file.read_bytes()))
    assert message in refusal(file.parent)
