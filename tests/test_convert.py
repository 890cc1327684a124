"""Conversion between Meta's and Hugging Face's formats, and merging: against transformers, PEFT and torch.load."""

import json
import math
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, run
from helpers.models import relative
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_tokenizer_llama3 import Files, files
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_ft import cli, convert
from llama_ft.config import ModelConfig, PlanConfig, UserError, config_dir
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.state import GenerationState
from llama_ft.model.folder import sizes_of
from llama_ft.model.formats import hf_name, is_rotated
from llama_ft.model.mapped import read_pth
from llama_ft.model.sizes import hf_config, hf_sizes, meta_params, meta_sizes
from llama_ft.model.weights import load_model
from llama_ft.techniques.adapter import Adapters, load_adapter
from llama_ft.techniques.lora import LoRALinear, add_lora, lora_layers
from llama_ft.training.saver import save_trained

__all__ = ["files"]  # a fixture
CPU = torch.device("cpu")
# Sizes that three shards divide; ffn_dim 192 is no width of Meta's rule without a multiplier.
SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 192}
SIZES |= {"vocab_size": 120, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
LLAMA_3_1 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 6},
    "gqa": {"num_key_value_heads": 3},
    "llama3_1": {
        "num_key_value_heads": 3,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_3_1 | {"original_max_position_embeddings": 8192},
    },
    # So short an original context that all three ranges of frequencies occur within the 256 tokens.
    "scaled": {"num_key_value_heads": 3, "rope_scaling": LLAMA_3_1 | {"original_max_position_embeddings": 64}},
    "linear": {"num_key_value_heads": 6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "tied": {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "wide_heads": {"num_key_value_heads": 3, "head_dim": 32},
}
TO_META = ["mha", "gqa", "llama3_1", "tied"]  # Meta's format has no words for the others


def theirs(name: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """transformers' model with weights far from uniform."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **MODELS[name])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + (parameter.dim() == 1))
    model.tie_weights()
    return model.to(dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """transformers' checkpoints by model, dtype and whether they are in several files; made once, not to be changed."""
    made: dict[tuple[Any, ...], Path] = {}

    def folder(name: str, dtype: torch.dtype = torch.float32, sharded: bool = False) -> Path:
        key = (name, dtype, sharded)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("hf") / f"{name}-hf"
            theirs(name, dtype).save_pretrained(made[key], max_shard_size="200KB" if sharded else "1GB")
            assert len(list(made[key].glob("*.safetensors"))) == (3 if sharded else 1) or sharded
        return made[key]

    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """`python -m llama_ft.convert ARGUMENTS` in this process; what it printed."""

    def converted(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        assert convert.main() == 0
        return "".join(capsys.readouterr())

    return converted


Command = Callable[..., str]
Folders = Callable[..., Path]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def pth(folder: Path) -> list[dict[str, Tensor]]:
    """The shards of a folder in Meta's format, as torch reads them."""
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("consolidated.*.pth"))]


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def ours(folder: Path, **sizes: Any) -> Any:
    config = ModelConfig(**(sizes_of(folder) | sizes))
    return load_model(config, str(folder), CPU, torch.float32).eval()


# Round trips


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TO_META)
def test_hf_to_meta_to_hf(
    tmp_path: Path, folders: Folders, command: Command, name: str, dtype: torch.dtype, n_shards: int
) -> None:
    first = folders(name, dtype, sharded=n_shards > 1)
    command(f"checkpoint={first}", "to=meta", f"output={tmp_path / 'meta'}", f"shards={n_shards}")
    assert len(pth(tmp_path / "meta")) == n_shards
    command(f"checkpoint={tmp_path / 'meta'}", "to=hf", f"output={tmp_path / 'hf'}", f"shards={n_shards}")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == n_shards
    assert are_equal(tensors(first), tensors(tmp_path / "hf"))


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("name", TO_META)
def test_meta_to_hf_to_meta(tmp_path: Path, folders: Folders, command: Command, name: str, n_shards: int) -> None:
    write_meta(theirs(name), tmp_path / "first", n_shards, by_rows=False)
    command(f"checkpoint={tmp_path / 'first'}", "to=hf", f"output={tmp_path / 'hf'}", "shards=2")
    assert are_equal(tensors(tmp_path / "hf"), tensors(folders(name)))
    command(f"checkpoint={tmp_path / 'hf'}", "to=meta", f"output={tmp_path / 'meta'}", f"shards={n_shards}")
    assert all(map(are_equal, pth(tmp_path / "meta"), pth(tmp_path / "first")))
    assert len(pth(tmp_path / "meta")) == n_shards


def write_meta(model: LlamaForCausalLM, folder: Path, n_shards: int, by_rows: bool) -> None:
    """Meta's files, made by hand from transformers' model: adjacent pairs, and two copies of tied embeddings."""
    folder.mkdir()
    split = {
        "wq": 0,
        "wk": 0,
        "wv": 0,
        "wo": 1,
        "w1": 0,
        "w2": 1,
        "w3": 0,
        "output": 0,
        "tok_embeddings": 0 if by_rows else 1,
    }
    config = ModelConfig(**({"name": "any"} | hf_sizes_of(model)))
    names = [
        *(f"layers.{n}.{part}" for n in range(config.n_layers) for part in LAYER),
        "tok_embeddings",
        "norm",
        "output",
    ]
    shards: list[dict[str, Tensor]] = [{} for _ in range(n_shards)]
    state = model.state_dict()
    for name in names:
        weight = state[hf_name(f"{name}.weight")]
        if is_rotated(f"{name}.weight"):
            order = [i // 2 + i % 2 * config.head_dim // 2 for i in range(config.head_dim)]
            weight = torch.cat([head[order] for head in weight.split(config.head_dim)])
        dim = split.get(name.rpartition(".")[2])
        for shard, part in zip(
            shards, [weight] * n_shards if dim is None else weight.chunk(n_shards, dim), strict=True
        ):
            shard[f"{name}.weight"] = part.clone()
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    # 256 is int(2 / 3 * 4 * 96): 192 is 0.7 of it, rounded up to a multiple of 64.
    params = {
        "dim": 96,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    params |= {"multiple_of": 64, "ffn_dim_multiplier": 0.7, "rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        params["use_scaled_rope"] = True
    (folder / "params.json").write_text(json.dumps(params))


LAYER = [f"attention.{w}" for w in ("wq", "wk", "wv", "wo")] + [f"feed_forward.{w}" for w in ("w1", "w2", "w3")]
LAYER += ["attention_norm", "ffn_norm"]


def hf_sizes_of(model: LlamaForCausalLM) -> dict[str, Any]:
    c = model.config
    sizes = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads}
    sizes |= {"n_kv_heads": c.num_key_value_heads, "ffn_dim": c.intermediate_size, "vocab_size": c.vocab_size}
    scaled = c.rope_parameters["rope_type"] == "llama3"
    return sizes | {"rope_theta": c.rope_parameters["rope_theta"], "rope_factor": 8.0 if scaled else 1.0}


def test_llama_3_splits_embeddings_by_rows(tmp_path: Path, command: Command) -> None:
    write_meta(theirs("gqa"), tmp_path / "meta", 3, by_rows=True)
    command(f"checkpoint={tmp_path / 'meta'}", "to=hf", f"output={tmp_path / 'hf'}")
    assert torch.equal(
        tensors(tmp_path / "hf")["model.embed_tokens.weight"], theirs("gqa").state_dict()["model.embed_tokens.weight"]
    )


def test_files_are_as_their_libraries_write_them(tmp_path: Path, folders: Folders, command: Command) -> None:
    command(f"checkpoint={folders('gqa')}", "to=meta", f"output={tmp_path / 'meta'}", "shards=3")
    for file in (tmp_path / "meta").glob("*.pth"):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None  # checksums included
        saved = torch.load(file, weights_only=True)
        assert {name: place.shape for name, place in read_pth(file).items()} == {
            n: list(t.shape) for n, t in saved.items()
        }
    mixed = tensors(folders("mha")) | {"model.norm.weight": torch.ones(96, dtype=torch.float16)}
    shutil.copytree(folders("mha"), tmp_path / "mixed")
    save_file(mixed, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    command(f"checkpoint={tmp_path / 'mixed'}", "to=hf", f"output={tmp_path / 'hf'}")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert are_equal(tensors(tmp_path / "hf"), mixed)
    # The widest first, as safetensors has it, so that each is aligned.
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size == (
        tmp_path / "mixed" / "model.safetensors"
    ).stat().st_size


@pytest.mark.parametrize(
    "name",
    ["llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_1_8b", "llama3_2_1b", "llama3_2_3b", "tinyllama_1b"],
)
def test_params_and_config_say_a_models_sizes(tmp_path: Path, name: str) -> None:
    cli.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        model = OmegaConf.to_object(compose("plan", [f"model={name}"])).model
    params, content = meta_params(model), hf_config(model, "bfloat16", 1, 2)
    (tmp_path / "params.json").write_text(json.dumps(params))
    (tmp_path / "config.json").write_text(json.dumps(content))
    for sizes in (meta_sizes(tmp_path / "params.json", math.nan), hf_sizes(tmp_path / "config.json")):
        assert all(getattr(model, key) == value for key, value in sizes.items())
    published = {
        "llama2_7b": (None, 256),
        "llama2_70b": (1.3, 4096),
        "llama3_8b": (1.3, 1024),
        "llama3_2_1b": (1.5, 256),
    }
    if name in published:
        assert (params.get("ffn_dim_multiplier"), params["multiple_of"]) == published[name]


@pytest.mark.parametrize("dim", [8, 64, 4096])
def test_any_width_can_be_said_in_metas_terms(tmp_path: Path, dim: int) -> None:
    for ffn_dim in (*range(1, 300), 10001, 11008, 2**24):
        params = meta_params(ModelConfig("any", dim=dim, n_heads=4, n_kv_heads=4, ffn_dim=ffn_dim))
        (tmp_path / "params.json").write_text(json.dumps(params))
        assert meta_sizes(tmp_path / "params.json", 8.0)["ffn_dim"] == ffn_dim


def test_a_hundred_shards_and_more_are_put_together_in_their_order(tmp_path: Path, command: Command) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128}
    config = LlamaConfig(**sizes, vocab_size=128, intermediate_size=128, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "first")
    command(f"checkpoint={tmp_path / 'first'}", "to=meta", f"output={tmp_path / 'meta'}", "shards=128")
    command(f"checkpoint={tmp_path / 'meta'}", "to=hf", f"output={tmp_path / 'hf'}", "shards=12")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 12  # of as many tensors
    assert are_equal(tensors(tmp_path / "first"), tensors(tmp_path / "hf"))


# Logits and text


def assert_same(model: Any, reference: Any) -> None:
    """Logits of two texts to 1e-5, and 64 tokens of greedy text."""
    tokens = torch.randint(3, 120, (2, 150), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert relative(model(tokens), reference(tokens).logits) <= 1e-5
        context = GenerationState(model, [tokens[0, :9].tolist()], 64, True, torch.float32)
        for _ in range(64):
            context.append(context.next_logits().argmax(-1))
        settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = reference.generate(tokens[:1, :9], **settings)
    assert torch.equal(context.tokens, expected)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_text_are_transformers(folders: Folders, name: str) -> None:
    assert_same(ours(folders(name)), theirs(name))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_has_the_same_logits_there_and_here(
    tmp_path: Path, folders: Folders, command: Command, name: str
) -> None:
    command(f"checkpoint={folders(name)}", "to=hf", f"output={tmp_path / 'hf'}", "shards=2")
    assert_same(ours(tmp_path / "hf"), AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval())
    if name in TO_META:
        command(f"checkpoint={folders(name)}", "to=meta", f"output={tmp_path / 'meta'}")
        # What the context is, Meta's files do not say; and by how much Llama 3.2 scales, no more than 3.1.
        assert_same(ours(tmp_path / "meta", max_seq_len=256), theirs(name))


def test_a_model_from_its_folder(folders: Folders, tmp_path: Path) -> None:
    sizes = sizes_of(folders("llama3_1"))
    expected = {
        "name": "llama3_1-hf",
        "dim": 96,
        "n_kv_heads": 3,
        "max_seq_len": 256,
        "rope_factor": 8.0,
        "rope_theta": 5e5,
    }
    assert expected.items() <= sizes.items()
    write_meta(theirs("llama3_1"), tmp_path / "meta", 3, by_rows=True)
    meta = sizes_of(tmp_path / "meta")
    assert (meta.pop("name"), meta.pop("max_seq_len")) == ("meta", 131072)
    assert meta == {key: sizes[key] for key in meta}


# Adapters


EVERYWHERE = ["wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "with_head": {"r": 4, "lora_alpha": 2.5, "target_modules": ["k_proj", "down_proj", "lm_head"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "up_proj": 5},
    },
    "some_layers": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj", "k_proj"], "layers_to_transform": [1]},
}


def peft_adapter(model: LlamaForCausalLM, folder: Path, kind: str) -> Any:
    """An adapter that changes much, in PEFT's folder; the adapted model."""
    adapted = get_peft_model(model, LoraConfig(**ADAPTERS[kind], task_type="CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("mha", "default"), *(("gqa", kind) for kind in ADAPTERS), ("llama3_1", "all_linear"), ("tied", "with_head")],
)
def test_an_adapter_of_peft(tmp_path: Path, folders: Folders, name: str, kind: str, merge: bool) -> None:
    reference = peft_adapter(theirs(name), tmp_path / "adapter", kind)
    model, plain = ours(folders(name)), ours(folders(name))
    load_adapter(model, tmp_path / "adapter", merge)
    assert_same(model, reference)
    tokens = torch.arange(3, 100)[None]
    with torch.no_grad():
        assert relative(model(tokens), plain(tokens)) > 0.05


@pytest.mark.parametrize("name", ["mha", "gqa", "tied"])
@pytest.mark.parametrize(("targets", "rslora"), [(["wq", "wk"], True), (EVERYWHERE, False)])
def test_an_adapter_of_ours_in_peft_and_back(
    tmp_path: Path, folders: Folders, name: str, targets: list[str], rslora: bool
) -> None:
    model = ours(folders(name))
    add_lora(model, 5, 12.0, 0.1, targets, rslora=rslora)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    (tmp_path / "ours").mkdir()
    (tmp_path / "again").mkdir()
    save_trained(model, tmp_path / "ours", "somewhere")
    loaded = PeftModel.from_pretrained(theirs(name), tmp_path / "ours").eval()
    assert_same(model.eval(), loaded)
    loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = ours(folders(name))
    load_adapter(again, tmp_path / "theirs", False)
    ours_now, before = lora_layers(again), lora_layers(model)
    assert ours_now.keys() == before.keys()
    for layer, adapted in ours_now.items():
        assert torch.equal(adapted.lora_A, before[layer].lora_A)
        assert torch.equal(adapted.lora_B, before[layer].lora_B)
        assert adapted.scale == before[layer].scale
    # The same files again, to the bit.
    save_trained(again, tmp_path / "again", "somewhere")
    assert are_equal(*(load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "again")))


def test_an_adapter_of_an_old_peft_is_read(tmp_path: Path, folders: Folders) -> None:
    reference = peft_adapter(theirs("gqa"), tmp_path / "adapter", "default")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter" / "adapter_model.bin")
    file.unlink()
    model = ours(folders("gqa"))
    load_adapter(model, tmp_path / "adapter", True)
    assert_same(model, reference)


def test_merging_and_taking_out_again(folders: Folders) -> None:
    model, plain = ours(folders("gqa")), ours(folders("gqa"))
    add_lora(model, 8, 16.0, 0.0, EVERYWHERE)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    tokens = torch.arange(3, 100)[None]
    with torch.no_grad():
        beside = model(tokens)
        for layer in lora_layers(model).values():
            layer.merge()
            layer.merge()  # once is enough
        assert relative(model(tokens), beside) <= 1e-5
        assert relative(beside, plain(tokens)) > 0.05
        for layer in lora_layers(model).values():
            layer.unmerge()
        assert torch.equal(model(tokens), beside) or relative(model(tokens), beside) <= 1e-5
    for name, layer in lora_layers(model).items():
        assert relative(layer.weight, plain.get_submodule(name).weight) <= 1e-6


def test_a_merged_16_bit_weight_is_rounded_once() -> None:
    linear = torch.nn.Linear(64, 48, bias=False).bfloat16()
    base = linear.weight.detach().clone()
    layer = LoRALinear(linear, 4, 8.0, 0.0, torch.float32)
    torch.nn.init.normal_(layer.lora_B, std=0.01)
    exact = base.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge()
    assert (layer.weight == exact.float().bfloat16()).float().mean() > 0.999  # fp32's own rounding may tip a tie


def test_two_adapters_side_by_side(tmp_path: Path, folders: Folders) -> None:
    tokens, expected = torch.arange(3, 100)[None], {}
    for kind in ("default", "with_head"):
        reference = peft_adapter(theirs("tied"), tmp_path / kind, kind)
        with torch.no_grad():
            expected[kind] = reference(tokens).logits
    model = ours(folders("tied"))
    weights = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.named_parameters()}
    adapters = Adapters(model)
    with torch.no_grad():
        expected[None] = model(tokens)
        for kind in ("default", "with_head"):
            adapters.add(kind, tmp_path / kind)
            assert torch.equal(model(tokens), expected[None])
        for kind in ("default", "with_head", None, "with_head", "default", None):
            adapters.use(kind)
            assert adapters.used == kind
            assert relative(model(tokens), expected[kind]) <= 1e-5
    now = dict(model.named_parameters())
    assert {name: weight.data_ptr() for name, weight in now.items()} == {n: place for n, (place, _) in weights.items()}
    assert all(torch.equal(now[name], weight) for name, (_, weight) in weights.items())
    with pytest.raises(UserError, match="there is no such folder"):
        adapters.add("third", tmp_path / "third")
    assert "third" not in adapters


# Merged exports


@pytest.mark.parametrize(("name", "kind"), [("gqa", "all_linear"), ("gqa", "patterns"), ("tied", "with_head")])
def test_a_merged_export(tmp_path: Path, folders: Folders, command: Command, name: str, kind: str) -> None:
    reference = peft_adapter(theirs(name), tmp_path / "adapter", kind)
    printed = command(
        f"checkpoint={folders(name)}", f"adapter={tmp_path / 'adapter'}", "to=hf", f"output={tmp_path / 'merged'}"
    )
    assert "changed the logits" not in printed  # fp32 weights stay in fp32
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same(ours(tmp_path / "merged"), merged)
    tokens = torch.arange(3, 100)[None]
    with torch.no_grad():
        assert relative(merged(tokens).logits, reference(tokens).logits) <= 1e-5
    assert merged.config.tie_word_embeddings is (name == "tied" and kind != "with_head")
    if name == "tied":  # PEFT merges the head into the embedding too, and says so
        return
    theirs_merged = reference.merge_and_unload().state_dict()
    for weight, tensor in tensors(tmp_path / "merged").items():
        assert relative(tensor, theirs_merged[weight]) <= 1e-6


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_rounding_is_reported(tmp_path: Path, folders: Folders, command: Command, to: str) -> None:
    reference = peft_adapter(theirs("gqa"), tmp_path / "adapter", "all_linear")
    where, adapter = f"checkpoint={folders('gqa')}", f"adapter={tmp_path / 'adapter'}"
    output = tmp_path / "merged"
    printed = command(where, adapter, f"to={to}", f"output={output}", "dtype=bf16", "shards=3")
    found = re.search(r"changed the logits by (\S+) at most and (\S+) on average .* at (\d+) of 256 positions", printed)
    # The same by hand: transformers with PEFT against our model of what was written.
    tokens = torch.randint(120, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, rounded = reference(tokens).logits, ours(output, max_seq_len=256)(tokens)
    difference = (exact - rounded).abs()
    assert found
    assert float(found[1]) == pytest.approx(difference.max().item(), rel=0.05)
    assert float(found[2]) == pytest.approx(difference.mean().item(), rel=0.05)
    assert int(found[3]) == (exact.argmax(-1) != rounded.argmax(-1)).sum()
    assert difference.max() > 1e-3
    written = tensors(output) if to == "hf" else {k: v for shard in pth(output) for k, v in shard.items()}
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert "changed the logits" not in command(
        where, f"to={to}", f"output={tmp_path / 'quiet'}", "dtype=bf16", "probe=false"
    )


def test_what_a_run_left_is_exported(tmp_path: Path, command: Command) -> None:
    config = ModelConfig("small", 64, 2, 4, 2, 96, 120, 256)
    model = load_model(config, "random", CPU, torch.float32)
    (tmp_path / "run").mkdir()
    save_trained(model, tmp_path / "run")
    command(f"checkpoint={tmp_path / 'run'}", "to=hf", f"output={tmp_path / 'hf'}")
    assert_same(model.eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval())


def test_the_built_in_model_with_its_tokenizer(tmp_path: Path, command: Command) -> None:
    command("model=tiny", "to=hf", f"output={tmp_path / 'tiny'}")
    tokenizer, reference = (
        AutoTokenizer.from_pretrained(tmp_path / "tiny"),
        Tokenizer(tmp_path / "tiny" / "tokenizer.model"),
    )
    text = "### Instruction:\nName  a colour. é\n\n### Response:"
    assert tokenizer(text).input_ids == reference.encode(text, bos=True)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert (model.config.bos_token_id, model.generation_config.eos_token_id) == (reference.bos_id, reference.eos_id)
    assert model.config.max_position_embeddings == 1024


def test_what_takes_more_digits_is_not_rounded(tmp_path: Path, folders: Folders, command: Command) -> None:
    bf16 = folders("gqa", torch.bfloat16)
    assert "changed the logits" not in command(f"checkpoint={bf16}", "to=hf", f"output={tmp_path / 'a'}", "dtype=fp32")
    assert {tensor.dtype for tensor in tensors(tmp_path / "a").values()} == {torch.float32}
    assert "changed the logits" in command(f"checkpoint={bf16}", "to=hf", f"output={tmp_path / 'b'}", "dtype=fp16")
    double = {name: tensor.double() + 1e-12 for name, tensor in tensors(folders("gqa")).items()}
    shutil.copytree(folders("gqa"), tmp_path / "double")
    save_file(double, tmp_path / "double" / "model.safetensors")
    said = command(f"checkpoint={tmp_path / 'double'}", "to=hf", f"output={tmp_path / 'c'}", "dtype=fp32")
    found = re.search(r"changed the logits by (\S+) at most", said)
    assert found
    assert 0 < float(found[1]) < 1e-4


def test_a_tokenizer_of_another_kind_is_copied_or_left_out(tmp_path: Path, folders: Folders, command: Command) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders("gqa"), source)
    (source / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "WordLevel"}}')
    (source / "tokenizer_config.json").write_text("{}")
    said = command(f"checkpoint={source}", "to=hf", f"output={tmp_path / 'hf'}")
    assert "its files are copied as they are" in said
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    said = command(f"checkpoint={source}", "to=meta", f"output={tmp_path / 'meta'}")
    assert "it is left out" in said
    assert (
        "Meta's files do not say the context of 256, and are read as of 4,096: give model.max_seq_len=256 with them"
        in said
    )
    assert {file.name for file in (tmp_path / "meta").iterdir()} == {"consolidated.00.pth", "params.json"}


def test_bos_and_eos_are_the_models_own(tmp_path: Path, folders: Folders, command: Command) -> None:
    shutil.copytree(folders("gqa"), tmp_path / "source", ignore=shutil.ignore_patterns("generation_config.json"))
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token_id": 100, "eos_token_id": 101}))
    command(f"checkpoint={tmp_path / 'source'}", "to=hf", f"output={tmp_path / 'hf'}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (100, 101)
    command(f"checkpoint={tmp_path / 'source'}", "to=meta", f"output={tmp_path / 'meta'}")
    command(f"checkpoint={tmp_path / 'meta'}", "to=hf", f"output={tmp_path / 'llama2'}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama2")
    assert (model.generation_config.bos_token_id, model.config.eos_token_id) == (1, 2)


def test_a_run_is_the_same_wherever_its_checkpoint_lies(tmp_path: Path, folders: Folders) -> None:
    hashes = set()
    for name in ("one", "models--owner--Some-LLaMA/snapshots/0123abcd", "tiny"):
        shutil.copytree(folders("gqa"), tmp_path / name)
        shutil.copy(CHECKOUT / "llama_ft" / "model" / "tiny" / "tokenizer.model", tmp_path / name)
        arguments = ["model=from_checkpoint", f"checkpoint='{tmp_path / name}'", "gpu=cpu"]
        config = cli.composed_config("plan", arguments, PlanConfig)
        hashes.add(config.hash())
        expected = {"one": "one", "tiny": "tiny-checkpoint"}.get(name, "Some-LLaMA")
        assert config.model.name == expected
        assert config.tokenizer_file == tmp_path / name / "tokenizer.model"
    assert len(hashes) == 1


def test_settings_of_the_source_are_kept(tmp_path: Path, folders: Folders, command: Command) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders("gqa"), source)
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [7, 9], "pretraining_tp": 1}))
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    command(f"checkpoint={source}", "to=hf", f"output={tmp_path / 'out'}", "dtype=fp16", "probe=false")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert {key for key in before | after if before.get(key) != after.get(key)} == {"dtype"}
    assert after["dtype"] == "float16"
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"temperature": 0.6}'


# A run


@pytest.mark.parametrize("kind", ["json", "model"])
def test_a_run_on_a_llama_3_2_of_which_only_the_folder_is_named(tmp_path: Path, files: Files, kind: str) -> None:
    """Trained by the command, its adapter loaded by PEFT; the tokenizer is the one in the folder."""
    scaling = LLAMA_3_1 | {"factor": 32.0, "original_max_position_embeddings": 8192}
    sizes = SIZES | {"vocab_size": 556, "max_position_embeddings": 2048, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, rope_theta=5e5, rope_scaling=scaling, tie_word_embeddings=True)
    folder = tmp_path / "Small 3.2"
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(files.file(kind), folder)
    arguments = ("model=from_checkpoint", f"checkpoint='{folder.name}'", "optim=lora", "lora.targets=[wq,wk,w2]")
    settings = ("training.max_samples=4", "training.lr=0.1", "tracker=disabled", "hydra.run.dir=run")
    done = run("llama_ft.train", *arguments, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["model"], result["status"]) == ("Small_3.2", "ok")
    trained = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / "run").eval()
    model = ours(folder)
    load_adapter(model, tmp_path / "run", True)
    assert_same(model, trained)
    with torch.no_grad():
        tokens = torch.arange(3, 100)[None]
        assert relative(model(tokens), LlamaForCausalLM.from_pretrained(folder)(tokens).logits) > 0.01
