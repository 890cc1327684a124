"""Checkpoints in the formats of Hugging Face, Meta and our own: what is read, what it costs, and what is refused."""

import copy
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, environment
from helpers.models import CPU, relative, small_config
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.decode import reference
from llama_ft.config import ModelConfig, UserError
from llama_ft.files import WEIGHTS_FILE
from llama_ft.model import mapped
from llama_ft.model.checkpoint import INDEX_FILE, open_checkpoint
from llama_ft.model.formats import hf_name
from llama_ft.model.mapped import StoredTensor
from llama_ft.model.sizes import hf_sizes, meta_sizes
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model, save_tensors

LAYER_NAMES = {  # Meta's and Hugging Face's, and how Meta's parallel layers are split
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
EMBEDDINGS = "tok_embeddings.weight"
# The kinds of value that a damaged or foreign JSON file can hold where another is expected.
ODD_VALUES = (None, True, -1, 0, 3, 0.5, math.inf, math.nan, 2**80, "x", "", [], [None], [[]], {}, {"a": {}})


def config_of(n_kv_heads: int = 2, n_layers: int = 3) -> ModelConfig:
    """Sizes that four shards divide, and numbers that are no one's defaults."""
    return replace(small_config(n_kv_heads), n_layers=n_layers, vocab_size=104, norm_eps=1e-4, rope_theta=5e4)


@functools.cache
def reference_model(n_kv_heads: int = 2, n_layers: int = 3) -> LlamaForCausalLM:
    model = load_model(config_of(n_kv_heads, n_layers), "random", CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # gains too, and nothing symmetric
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return reference(model)


def meta_weights(hf: LlamaForCausalLM) -> dict[str, Tensor]:
    """transformers' weights in Meta's layout: rows of wq and wk in the order of adjacent pairs."""
    theirs = hf.state_dict()
    weights = {EMBEDDINGS: theirs["model.embed_tokens.weight"]}
    weights |= {"norm.weight": theirs["model.norm.weight"], "output.weight": theirs["lm_head.weight"]}
    head_dim = hf.config.hidden_size // hf.config.num_attention_heads
    for layer in range(hf.config.num_hidden_layers):
        for meta, (name, _) in LAYER_NAMES.items():
            weight = theirs[f"model.layers.{layer}.{name}.weight"]
            if meta in ("attention.wq", "attention.wk"):
                order = [i // 2 + i % 2 * head_dim // 2 for i in range(head_dim)]
                weight = torch.cat([head[order] for head in weight.split(head_dim)])
            weights[f"layers.{layer}.{meta}.weight"] = weight
    return weights


def params_of(config: ModelConfig) -> dict[str, Any]:
    """Meta's params.json: ffn_dim 96 is 4 * 64 * 2/3 = 170, times 0.5, rounded up to a multiple of 32."""
    sizes = {"dim": 64, "n_layers": config.n_layers, "n_heads": 4, "n_kv_heads": config.n_kv_heads, "vocab_size": -1}
    return sizes | {"norm_eps": 1e-4, "rope_theta": 5e4, "ffn_dim_multiplier": 0.5, "multiple_of": 32}


def write_meta(
    folder: Path, n_shards: int = 1, n_kv_heads: int = 2, embeddings_dim: int = 1, rope: bool = True, n_layers: int = 3
) -> None:
    shards: list[dict[str, Tensor]] = [{} for _ in range(n_shards)]
    split = {meta: dim for meta, (_, dim) in LAYER_NAMES.items()}
    split |= {"tok_embeddings": embeddings_dim, "output": 0, "norm": None}
    for name, weight in meta_weights(reference_model(n_kv_heads, n_layers)).items():
        dim = split[re.sub(r"^layers\.\d+\.|\.weight$", "", name)]
        parts = [weight] * n_shards if dim is None else weight.chunk(n_shards, dim)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    for number, shard in enumerate(shards):
        torch.save(shard | ({"rope.freqs": torch.ones(8)} if rope else {}), folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(params_of(config_of(n_kv_heads, n_layers))))


def write_hf(folder: Path, n_kv_heads: int = 2, sharded: bool = False, n_layers: int = 3) -> None:
    size = "100KB" if sharded else "1GB"
    reference_model(n_kv_heads, n_layers).save_pretrained(folder, max_shard_size=size)


def write_own(folder: Path, n_layers: int = 3) -> None:
    save_tensors(meta_weights(reference_model(2, n_layers)), folder / WEIGHTS_FILE, config_of(2, n_layers))


WRITERS: dict[str, Callable[..., None]] = {
    "hf": write_hf,
    "sharded": functools.partial(write_hf, sharded=True),
    "meta": write_meta,
    "own": write_own,
}


def load(folder: Path, config: ModelConfig | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(config or config_of(), str(folder), CPU, dtype)


def assert_logits_equal(model: Transformer, hf: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 104, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(model(tokens), hf(tokens).logits) <= 1e-5


def assert_weights_equal(model: Transformer, hf: LlamaForCausalLM) -> None:
    expected = meta_weights(hf)
    assert expected.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


# What is read


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_hf_checkpoint_has_transformers_logits(tmp_path: Path, n_kv_heads: int, sharded: bool) -> None:
    write_hf(tmp_path, n_kv_heads, sharded)
    n_files = len(list(tmp_path.glob("*.safetensors")))
    assert n_files >= 3 if sharded else n_files == 1
    assert_logits_equal(load(tmp_path, config_of(n_kv_heads)), reference_model(n_kv_heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_hf_weights_in_another_dtype_are_rounded_once(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    copy.deepcopy(reference_model()).to(stored).save_pretrained(tmp_path)
    assert_weights_equal(load(tmp_path, dtype=dtype), LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype))


def test_hf_checkpoint_of_2023_is_read(tmp_path: Path) -> None:
    write_hf(tmp_path, n_kv_heads=4)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "dtype"):
        config.pop(key, None)
    old = {"rope_theta": 50000.0, "rope_scaling": None, "pretraining_tp": 1, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)}
    save_file(load_file(tmp_path / WEIGHTS_FILE) | tables, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    assert_logits_equal(load(tmp_path, config_of(4)), reference_model(4))


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    write_hf(tmp_path, sharded=True)
    write_hf(tmp_path)  # which removes the shards and leaves their index
    assert (tmp_path / INDEX_FILE).exists()
    assert_weights_equal(load(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("embeddings_dim", [1, 0], ids=["columns", "rows"])
@pytest.mark.parametrize(("n_shards", "n_kv_heads", "rope"), [(1, 4, True), (1, 2, False), (2, 2, True), (4, 4, False)])
def test_meta_checkpoint_has_transformers_logits(
    tmp_path: Path, n_shards: int, n_kv_heads: int, rope: bool, embeddings_dim: int
) -> None:
    write_meta(tmp_path, n_shards, n_kv_heads, embeddings_dim, rope)
    model = load(tmp_path, config_of(n_kv_heads))
    assert_weights_equal(model, reference_model(n_kv_heads))
    assert_logits_equal(model, reference_model(n_kv_heads))


def test_meta_checkpoint_of_other_writers_is_read(tmp_path: Path) -> None:
    """Parameters, views of larger tensors, state dicts, tensors of a GPU, fp16, archives packed again."""
    write_meta(tmp_path)
    file = tmp_path / "consolidated.00.pth"
    weights = meta_weights(reference_model())
    holder = torch.nn.Module()
    holder.register_parameter("norm", torch.nn.Parameter(weights["norm.weight"].clone()))
    views = {"output.weight": torch.cat((weights["output.weight"], weights["output.weight"]))[104:]}
    state = holder.state_dict(keep_vars=True)  # an OrderedDict with an attribute
    state["norm.weight"] = state.pop("norm")
    state.update({name: weight for name, weight in weights.items() if name not in state} | views)
    torch.save(state, file)
    assert_weights_equal(load(tmp_path), reference_model())
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    data = next(name for name in records if name.endswith("/data.pkl"))
    records[data] = records[data].replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0")
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert_weights_equal(load(tmp_path), reference_model())
    torch.save({name: weight.half() for name, weight in weights.items()}, file)
    half = {name: weight.half().bfloat16() for name, weight in weights.items()}
    loaded = load(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in half.items())


META_SIZES = {  # the params.json of LLaMA 2, and of LLaMA 1 where they do not differ
    "llama2_7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32},
    "llama2_13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40},
    "llama2_70b": {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
    },
}


@pytest.mark.parametrize(("name", "ffn_dim"), [("llama2_7b", 11008), ("llama2_13b", 13824), ("llama2_70b", 28672)])
def test_sizes_of_the_released_models(tmp_path: Path, name: str, ffn_dim: int) -> None:
    file = tmp_path / "params.json"
    params = META_SIZES[name] | {"norm_eps": 1e-5, "vocab_size": -1}
    file.write_text(json.dumps(params))
    ours = ModelConfig(**OmegaConf.load(CHECKOUT / "conf" / "model" / f"{name}.yaml"))
    sizes = meta_sizes(file, 8.0)
    assert sizes["ffn_dim"] == ffn_dim
    assert sizes["n_kv_heads"] == params.get("n_kv_heads", params["n_heads"])
    assert {
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "ffn_dim",
        "norm_eps",
        "rope_theta",
        "rope_factor",
    } == sizes.keys()
    assert all(getattr(ours, key) == value for key, value in sizes.items())
    assert ours.vocab_size == 32000


def test_sizes_of_tinyllama(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 5632, "vocab_size": 32000, "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "llama", "rope_scaling": None}))
    ours = ModelConfig(**OmegaConf.load(CHECKOUT / "conf" / "model" / "tinyllama_1b.yaml"))
    assert all(getattr(ours, key) == value for key, value in hf_sizes(tmp_path / "config.json").items())


@pytest.mark.parametrize("n_elements", [1, 175, 1250])
@pytest.mark.parametrize("kind", WRITERS)
def test_pieces_make_up_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, n_elements: int) -> None:
    WRITERS[kind](tmp_path)
    monkeypatch.setattr(mapped, "PIECE_ELEMENTS", n_elements)
    pieces, read = [], StoredTensor.pieces
    monkeypatch.setattr(StoredTensor, "pieces", lambda *args: (pieces.append(piece) or piece for piece in read(*args)))
    assert_weights_equal(load(tmp_path), reference_model())
    assert len(pieces) > 100
    # No more than asked for, unless one head's rows of 64 elements are more, which the permutation needs together.
    assert max(rows.numel() for _, rows in pieces) <= max(n_elements, 16 * 64)


def test_what_is_read_is_said(tmp_path: Path) -> None:
    write_hf(tmp_path, sharded=True)
    lines: list[str] = []
    load_model(config_of(), str(tmp_path), CPU, torch.float32, log=lines.append)
    files, n_bytes = list(tmp_path.glob("*.safetensors")), 4 * sum(p.numel() for p in reference_model().parameters())
    assert lines == [f"weights: {n_bytes / 2**20:.0f} MiB from {tmp_path} (Hugging Face, {len(files)} files)"]


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
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
    weights = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}
    if kind == "own":
        save_tensors(weights, folder / WEIGHTS_FILE, config)
    elif kind == "meta":
        torch.save(weights, folder / "consolidated.00.pth")
        derived = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "vocab_size": -1}
        (folder / "params.json").write_text(json.dumps(derived))
    else:
        files = [f"model-{number}.safetensors" for number in range(3)]
        weight_map = {}
        for number, file in enumerate(files):
            part = {hf_name(name): weights[name] for name in list(weights)[number::3]}
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        sizes = {"hidden_size": config.dim, "num_hidden_layers": config.n_layers, "vocab_size": config.vocab_size}
        sizes |= {"num_attention_heads": config.n_heads, "intermediate_size": config.ffn_dim, "rms_norm_eps": 1e-5}
        (folder / "config.json").write_text(json.dumps(sizes))
    return weights


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["sharded", "meta", "own"])
def test_loading_needs_the_model_and_a_tenth_at_most(tmp_path: Path, kind: str) -> None:
    config = ModelConfig(name="large", dim=1024, n_layers=4, n_heads=8, n_kv_heads=8, ffn_dim=2816, vocab_size=6000)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:  # pytest would keep 250 MiB
        weights = write_large(Path(folder), kind, config)
        expected = {name: [weight[0].max().item()] * 2 for name, weight in weights.items()}
        n_bytes = sum(weight.nbytes for weight in weights.values())
        del weights
        arguments = (folder, json.dumps(asdict(config)), str(n_bytes))
        child = python(LOADING, *arguments, cwd=tmp_path)
    result = json.loads(child.stdout)
    assert n_bytes > 240e6
    assert result["found"] == expected
    print("GROWTH", kind, result["growth"] - n_bytes)
    assert n_bytes <= result["growth"] <= 1.1 * n_bytes


SAVING = """
import resource, sys
from pathlib import Path
import torch
from llama_ft.config import ModelConfig, UserError
from llama_ft.model.weights import load_model, save_tensors

config = ModelConfig(name="small", dim=64, n_layers=3, n_heads=4, n_kv_heads=4, ffn_dim=96, vocab_size=101)
model = load_model(config, "random", torch.device("cpu"), torch.float32)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_tensors(model.state_dict(), Path(sys.argv[1]), config)
except UserError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    child = python(SAVING, str(folder / WEIGHTS_FILE), cwd=tmp_path)
    assert re.fullmatch(rf"{re.escape(str(folder / WEIGHTS_FILE))} \(0 MiB\) cannot be written: .+\n", child.stdout)
    assert child.stderr == ""
    assert list(folder.iterdir()) == []


def python(code: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=True, timeout=120)


# What is refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind, in folders of their names."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, write in (WRITERS | {"shards": lambda f: write_meta(f, 4, embeddings_dim=0)}).items():
        (folder / kind).mkdir()
        write(folder / kind)
    return folder


@pytest.fixture
def copy_of(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a checkpoint to be damaged."""
    return lambda kind: Path(shutil.copytree(whole / kind, tmp_path / kind))


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


Copy = Callable[[str], Path]
Refusal = Callable[..., str]


def test_folders_without_weights_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    assert "there is no such folder" in refusal(tmp_path / "missing")
    assert "there is no such folder" in refusal(Path("~no-such-user-here"))
    assert "File name too long" in refusal(Path("x" * 5000))
    assert "there are no weights in it" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model*.bin is not read, convert it to safetensors" in refusal(tmp_path)
    assert "is a file: give the folder" in refusal(tmp_path / "pytorch_model.bin")
    (tmp_path / "consolidated.00.pth").mkdir()
    assert "there are no weights in it" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("hf", WEIGHTS_FILE),
        ("hf", "config.json"),
        ("sharded", INDEX_FILE),
        ("meta", "consolidated.00.pth"),
        ("meta", "params.json"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    copy_of: Copy, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    folder, opened = copy_of(kind), Path.open

    def open_or_deny(path: Path, *args: Any, **kwargs: Any) -> Any:  # since root may read any file
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_or_deny)
    assert f"{folder / name} cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 128, "model.dim is 64 and there 128"),
        ("num_hidden_layers", 4, "model.n_layers is 3 and there 4"),
        ("num_attention_heads", 8, "model.n_heads is 4 and there 8"),
        ("num_key_value_heads", 4, "model.n_kv_heads is 2 and there 4"),
        ("num_key_value_heads", None, "model.n_kv_heads is 2 and there 4"),
        ("intermediate_size", 128, "model.ffn_dim is 96 and there 128"),
        ("vocab_size", 105, "model.vocab_size is 104 and there 105"),
        ("rms_norm_eps", 1e-6, "model.norm_eps is 0.0001 and there 1e-06"),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "default"}, "model.rope_theta is 50000.0 and there 10000"),
        (
            "rope_parameters",
            {"rope_theta": 5e4, "rope_type": "linear", "factor": 2.0},
            "model.rope_factor is 1.0 and there 2.0",
        ),
        (
            "rope_parameters",
            {"rope_theta": 5e4, "rope_type": "llama3", "factor": 8.0},
            "does not say the model's rope_low_freq",
        ),
        ("rope_parameters", "default", "must be a JSON object"),
        ("model_type", "mistral", "model_type=mistral is not supported, it must be llama"),
        ("tie_word_embeddings", True, "model.tie_word_embeddings is False and there True"),
        ("tie_word_embeddings", 1, "tie_word_embeddings=1 is not supported"),
        ("attention_bias", True, "attention_bias=True is not supported"),
        ("hidden_act", "gelu", "hidden_act=gelu is not supported"),
        ("hidden_size", "64", "does not say the model's dim as a number"),
    ],
)
def test_hf_config_of_another_model_is_refused(
    copy_of: Copy, refusal: Refusal, key: str, value: object, message: str
) -> None:
    folder = copy_of("hf")
    change_json(folder / "config.json", key, value)
    assert message in refusal(folder)


def test_scaled_rotary_embeddings_of_old_configs_are_refused(copy_of: Copy, refusal: Refusal) -> None:
    folder = copy_of("hf")
    change_json(folder / "config.json", "rope_parameters", None)
    change_json(folder / "config.json", "rope_scaling", {"type": "dynamic", "factor": 2.0})
    assert "of type dynamic" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dim", 128, "model.dim is 64 and there 128"),
        ("n_layers", 4, "model.n_layers is 3 and there 4"),
        ("n_heads", 8, "model.n_heads is 4 and there 8"),
        ("n_kv_heads", 4, "model.n_kv_heads is 2 and there 4"),
        ("n_kv_heads", None, "model.n_kv_heads is 2 and there 4"),
        ("multiple_of", 256, "model.ffn_dim is 96 and there 256"),
        ("ffn_dim_multiplier", None, "model.ffn_dim is 96 and there 192"),
        ("norm_eps", 1e-6, "model.norm_eps is 0.0001 and there 1e-06"),
        ("rope_theta", None, "model.rope_theta is 50000.0 and there 10000.0"),
        ("vocab_size", 105, "model.vocab_size is 104 and there 105"),
        ("use_scaled_rope", True, "model.rope_factor is 1.0 and there 8.0"),
        ("multiple_of", 0, "is damaged: no ffn_dim follows"),
        ("dim", 10**400, "is damaged: no ffn_dim follows"),
    ],
)
def test_params_of_another_model_are_refused(
    copy_of: Copy, refusal: Refusal, key: str, value: object, message: str
) -> None:
    folder = copy_of("meta")
    change_json(folder / "params.json", key, value)
    assert message in refusal(folder)


@pytest.mark.parametrize(("kind", "name"), [("hf", "config.json"), ("meta", "params.json"), ("sharded", INDEX_FILE)])
def test_broken_json_is_refused(copy_of: Copy, refusal: Refusal, kind: str, name: str) -> None:
    folder = copy_of(kind)
    for content in (b"{", b"", b"[]", b"3", b"\xff\xfe", b"[" * 100_000):
        (folder / name).write_bytes(content)
        assert name in refusal(folder)
    (folder / name).unlink()
    assert ("there are no weights" if name == INDEX_FILE else f"{name} cannot be read (No such file") in refusal(folder)


def test_another_vocabulary_is_refused(copy_of: Copy, refusal: Refusal) -> None:
    other = replace(config_of(), vocab_size=105)
    for kind in ("hf", "sharded", "own"):
        assert "model.vocab_size is 105 and there 104" in refusal(copy_of(kind), other)
    assert "tok_embeddings.weight is [104, 64], and should be [105, 64]" in refusal(copy_of("meta"), other)


def test_own_weights_of_another_model_of_the_same_shapes_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    other = replace(config_of(), n_heads=8, n_kv_heads=4)
    save_tensors(meta_weights(reference_model()), tmp_path / WEIGHTS_FILE, other)
    assert "model.n_heads is 4 and there 8, model.n_kv_heads is 2 and there 4" in refusal(tmp_path)


@pytest.mark.parametrize("sizes", ["", "{", "[]", "3", "[" * 100_000, '{"n_heds": 4}'])
def test_own_weights_with_damaged_sizes_are_refused(tmp_path: Path, refusal: Refusal, sizes: str) -> None:
    save_file(meta_weights(reference_model()), tmp_path / WEIGHTS_FILE, metadata={"llama_ft.model": sizes})
    assert "its metadata cannot be read" in refusal(tmp_path)


def test_weights_of_unknown_layout_are_refused(copy_of: Copy, refusal: Refusal) -> None:
    """Meta's names, but nothing that says the sizes, or something that promises Hugging Face's layout."""
    folder = copy_of("hf")
    save_file(meta_weights(reference_model()), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    assert "30 tensors are missing, such as model.embed_tokens.weight" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-100], "it was not downloaded or copied completely"),
        (lambda b: b + b"x", "it is damaged"),
        (lambda b: b[:200], "its header cannot be read"),
        (lambda b: b[:7], "its header cannot be read"),
        (lambda b: struct.pack("<Q", 2**63) + b[8:], "its header cannot be read"),
        (lambda b: struct.pack("<Q", 0) + b[8:], "its header cannot be read"),
        (lambda b: b"[" * 100_000, "its header cannot be read"),
        (lambda b: struct.pack("<Q", 100_000) + b"[" * 100_000, "its header cannot be read"),
        (lambda b: b"weights of a model", "is not a safetensors file"),
        (lambda b: b"", "is empty"),
    ],
)
@pytest.mark.parametrize("kind", ["hf", "own"])
def test_damaged_safetensors_are_refused(
    copy_of: Copy, refusal: Refusal, kind: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    folder = copy_of(kind)
    file = folder / WEIGHTS_FILE
    file.write_bytes(damage(file.read_bytes()))
    assert message in refusal(folder)
    assert str(file) in refusal(folder)


def test_a_long_header_is_not_read(copy_of: Copy, refusal: Refusal) -> None:
    folder = copy_of("hf")
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 200_000_000))
    os.truncate(folder / WEIGHTS_FILE, 300_000_000)
    tracemalloc.start()
    assert "its header cannot be read" in refusal(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


WQ = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[WQ[1]].update(data_offsets=h[WQ[0]]["data_offsets"]), "cannot be bytes"),
        (lambda h: h[WQ[1]].update(data_offsets=[n + 4 for n in h[WQ[1]]["data_offsets"]]), "cannot be bytes"),
        (lambda h: h[WQ[1]].update(data_offsets=h[WQ[1]]["data_offsets"][::-1]), "cannot be bytes"),
        (lambda h: h[WQ[1]].update(data_offsets=[0, 10**12]), "not downloaded or copied completely"),
        (lambda h: h[WQ[1]].update(data_offsets=[-16384, 0]), "header cannot be read"),
        (lambda h: h[WQ[1]].update(data_offsets=[float(n) for n in h[WQ[1]]["data_offsets"]]), "header cannot be read"),
        (lambda h: h[WQ[1]].update(data_offsets=[0]), "header cannot be read"),
        (lambda h: h[WQ[1]].update(shape=[-64, -64]), "header cannot be read"),
        (lambda h: h[WQ[1]].update(shape=[64, math.inf]), "header cannot be read"),
        (lambda h: h[WQ[1]].update(shape=[32, 128]), f"{WQ[1]} is [32, 128], and should be [64, 64]"),
        (lambda h: h[WQ[1]].update(shape=[4096]), f"{WQ[1]} is [4096], and should be [64, 64]"),
        (lambda h: h[WQ[1]].update(dtype="F8_E4M3"), f"{WQ[1]} is stored as F8_E4M3; only F64, F32, F16, BF16"),
        (lambda h: h[WQ[1]].update(dtype="I8"), f"{WQ[1]} is stored as I8; only F64, F32, F16, BF16"),
        (lambda h: h[WQ[1]].update(dtype=["F32"]), "header cannot be read"),
        (lambda h: h.update(extra=h.pop(WQ[1])), f"1 tensors are missing, such as {WQ[1]}"),
        (lambda h: h.clear(), "bytes long, but its header says"),
    ],
)
def test_headers_that_do_not_fit_are_refused(
    copy_of: Copy, refusal: Refusal, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = copy_of("hf")
    header, data = split_safetensors((folder / WEIGHTS_FILE).read_bytes())
    change(header)
    (folder / WEIGHTS_FILE).write_bytes(join_safetensors(header, data))
    assert message in refusal(folder)


def test_scalars_and_empty_tensors_are_refused(copy_of: Copy, refusal: Refusal) -> None:
    for shape in ((), (0,), (1,)):
        folder = copy_of("hf")
        weights = load_file(folder / WEIGHTS_FILE) | {"model.norm.weight": torch.ones(shape)}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        assert f"model.norm.weight is {list(shape)}, and should be [64]" in refusal(folder)
        shutil.rmtree(folder)


def test_an_index_that_does_not_fit_is_refused(copy_of: Copy, refusal: Refusal) -> None:
    folder = copy_of("sharded")
    index = json.loads((folder / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    elsewhere = next(file for file in files if file != index["weight_map"][WQ[0]])

    def refused(**changed: object) -> str:
        content = {key: value for key, value in (index | changed).items() if value != "left out"}
        (folder / INDEX_FILE).write_text(json.dumps(content))
        return refusal(folder)

    assert "it must hold a weight_map" in refused(weight_map="left out")
    assert "it must hold a weight_map" in refused(weight_map=list(files))
    assert "it must hold a weight_map" in refused(weight_map={WQ[0]: 3, WQ[1]: None})
    assert "must name files of its own folder" in refused(weight_map=index["weight_map"] | {WQ[0]: f"../{files[0]}"})
    assert "must name files of its own folder" in refused(weight_map=dict.fromkeys(WQ, 3))
    assert "files are missing: x" in refused(weight_map=index["weight_map"] | {WQ[0]: "x"})
    assert f"{elsewhere} does not hold {WQ[0]}" in refused(weight_map=index["weight_map"] | {WQ[0]: elsewhere})
    assert "does not hold more.weight" in refused(weight_map=index["weight_map"] | {"more.weight": files[0]})
    (folder / files[1]).unlink()
    assert f"1 of {len(files)} files are missing: {files[1]}" in refused()


def test_missing_shards_of_meta_are_refused(copy_of: Copy, refusal: Refusal) -> None:
    folder = copy_of("shards")
    for number in (0, 2):
        hidden = (folder / f"consolidated.{number:02}.pth").rename(folder / "hidden")
        assert f"consolidated.{number:02}.pth is missing; there is " in refusal(folder)
        hidden.rename(folder / f"consolidated.{number:02}.pth")
    (folder / "consolidated.03.pth").unlink()  # which the shapes alone can tell
    assert "3 of 4 shards are there, the others are missing" in refusal(folder)


def test_the_same_file_as_two_shards_is_refused(copy_of: Copy, refusal: Refusal) -> None:
    folder = copy_of("meta")
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    assert f"{EMBEDDINGS} is [104, 64] and [104, 64], and should be [104, 64]" in refusal(folder)


class Code:
    """Something whose unpickling touches a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_code_in_a_pth_is_refused_and_not_run(copy_of: Copy, refusal: Refusal, tmp_path: Path) -> None:
    folder = copy_of("meta")
    torch.save(meta_weights(reference_model()) | {"rope.freqs": Code(tmp_path / "run")}, folder / "consolidated.00.pth")
    assert "it holds posix.system, and must hold tensors of F64, F32, F16, BF16 alone" in refusal(folder)
    assert not (tmp_path / "run").exists()


NORM = {"norm.weight": torch.ones(64)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "it must hold tensors by name"),
        (torch.ones(2), "it must hold tensors by name"),
        ({"model": NORM}, "it must hold tensors by name"),
        ({1: torch.ones(2)}, "it must hold tensors by name"),
        ({}, "30 tensors are missing, such as tok_embeddings.weight"),
        ({"norm.weight": torch.ones(64, dtype=torch.int32)}, "it holds torch.IntStorage, and must hold"),
        ({"norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}, "_rebuild_tensor_v3, and must hold"),
        ({"norm.weight": torch.ones(64, 2)[:, 0]}, "a tensor [64] that is not contiguous"),
        ({"norm.weight": torch.eye(64).to_sparse()}, "_rebuild_sparse_tensor, and must hold"),
    ],
)
def test_pth_with_other_content_is_refused(copy_of: Copy, refusal: Refusal, content: object, message: str) -> None:
    folder = copy_of("meta")
    torch.save(content, folder / "consolidated.00.pth")
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "is damaged or cut short"),
        (lambda b: b[:-100], "is damaged or cut short"),
        (lambda b: b[:1000] + b[5000:], "is damaged or cut short"),
        (lambda b: b"PK", "is damaged or cut short"),
        (lambda b: b"weights", "is not in PyTorch's zip format"),
        (lambda b: b"", "is empty"),
        (lambda b: repacked(b, zipfile.ZIP_DEFLATED, {}), "is compressed, or is not where it should be"),
        (lambda b: repacked(b, zipfile.ZIP_STORED, {"byteorder": b"big"}), "are not little-endian"),
        (lambda b: repacked(b, zipfile.ZIP_STORED, {"data.pkl": None}), "there is no data.pkl in it"),
        (lambda b: repacked(b, zipfile.ZIP_STORED, {"data/3": None}), "data/3' in the archive"),
        (lambda b: repacked(b, zipfile.ZIP_STORED, {"data/3": b"few"}), "reaches beyond its data"),
        # An instruction to remember something under number 2**31, which unpickling makes a table of 34 GB for.
        (lambda b: repacked(b, zipfile.ZIP_STORED, {"data.pkl": b"\x80\x02}r\x00\x00\x00\x7f."}), "more memory"),
    ],
)
def test_damaged_pth_is_refused(
    copy_of: Copy, refusal: Refusal, damage: Callable[[bytes], bytes], message: str
) -> None:
    folder = copy_of("meta")
    file = folder / "consolidated.00.pth"
    file.write_bytes(damage(file.read_bytes()))
    assert message in refusal(folder)
    assert str(file) in refusal(folder)


def test_pth_from_before_pytorch_1_6_is_refused(copy_of: Copy, refusal: Refusal) -> None:
    folder = copy_of("meta")
    torch.save(NORM, folder / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    assert "was saved before PyTorch 1.6" in refusal(folder)


def change_json(file: Path, key: str, value: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join_safetensors(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def repacked(content: bytes, compression: int, changed: dict[str, bytes | None]) -> bytes:
    """A zip file written again with other records, by the names below its one folder; None leaves one out."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w", compression) as new:
        for name in old.namelist():
            record = changed.get(name.split("/", 1)[1], old.read(name))
            if record is not None:
                new.writestr(name, record)
    return written.getvalue()


# Whatever is in a file: its weights, or a UserError


@pytest.fixture(scope="module")
def target() -> Transformer:
    """A model to load into, since making one takes longer than a small file to be read."""
    return load_model(config_of(2, 1), "random", CPU, torch.float32)


@torch.no_grad()
def is_loaded(folder: Path, target: Transformer) -> bool:
    """Whether a folder is loaded, rather than refused; any other end is an error."""
    for parameter in target.parameters():
        parameter.fill_(math.nan)
    try:
        checkpoint = open_checkpoint(folder, target)
    except UserError as error:
        message = str(error)
    else:
        checkpoint.load_into(target, lambda _: None)
        return True
    assert len(message.splitlines()) <= 2
    return False


def assert_whole_or_refused(folder: Path, target: Transformer) -> bool:
    loaded = is_loaded(folder, target)
    if loaded:
        assert_weights_equal(target, reference_model(2, 1))
    return loaded


def with_odd_values(content: Any) -> Iterator[Any]:
    """The same JSON with each of its parts in turn replaced by something odd."""
    yield from ODD_VALUES
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        for odd in with_odd_values(value):
            changed = copy.copy(content)
            changed[key] = odd
            yield changed


@pytest.mark.parametrize(
    ("kind", "name"), [("hf", "config.json"), ("meta", "params.json"), ("sharded", INDEX_FILE), ("own", WEIGHTS_FILE)]
)
def test_odd_values_in_json(tmp_path: Path, target: Transformer, kind: str, name: str) -> None:
    WRITERS[kind](tmp_path, n_layers=1)
    file, data = tmp_path / name, b""
    if name == WEIGHTS_FILE:
        content, data = split_safetensors(file.read_bytes())
    else:
        content = json.loads(file.read_text())
    loaded = []
    for changed in itertools.islice(with_odd_values(content), 500):
        file.write_bytes(join_safetensors(changed, data) if data else json.dumps(changed).encode())
        loaded.append(assert_whole_or_refused(tmp_path, target))
    assert not any(loaded[: len(ODD_VALUES)])


def mutated(content: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, lost or added."""
    result = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 5))):
        at, n = generator.randrange(len(result)), generator.choice((1, 1, 4, 50))
        new = generator.choice((n, n, n, 0, 2 * n))
        result[at : at + n] = generator.randbytes(new) if generator.random() < 0.7 else bytes(new)
        result = result or bytearray(b"0")
    return bytes(result)


def test_any_bytes_in_a_safetensors_header(tmp_path: Path, target: Transformer) -> None:
    write_hf(tmp_path, n_layers=1)
    file, generator = tmp_path / WEIGHTS_FILE, random.Random(0)
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(300):
        header = mutated(content[:end], generator)
        if len(header) >= 8 and generator.random() < 0.7:
            header = struct.pack("<Q", len(header) - 8) + header[8:]
        file.write_bytes(header + content[end:])
        assert_whole_or_refused(tmp_path, target)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize("part", ["ends", "pickle"])
def test_any_bytes_in_a_pth(tmp_path: Path, target: Transformer, part: str) -> None:
    write_meta(tmp_path, n_layers=1)
    file, generator = tmp_path / "consolidated.00.pth", random.Random(0)
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    for _ in range(300):
        if part == "pickle":  # with a checksum that is right
            file.write_bytes(repacked(content, zipfile.ZIP_STORED, {"data.pkl": mutated(pickled, generator)}))
        else:
            at = generator.choice((2000, len(content) - 2000))
            before, after = content[:at], content[at:]
            damaged = before + mutated(after, generator) if at > 2000 else mutated(before, generator) + after
            file.write_bytes(damaged[: generator.choice((None, None, None, generator.randrange(1, len(content))))])
        is_loaded(tmp_path, target)  # of other weights, where their bytes are what was changed
