"""Conversion between Meta's and Hugging Face's formats, and merging: against transformers, PEFT and torch.load."""

import json
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, run
from helpers.checkpoints import (
    ADAPTERS,
    EVERYWHERE,
    LLAMA_3_1,
    MODELS,
    SIZES,
    TO_META,
    are_equal,
    assert_same,
    config_of,
    hf_folder,
    ours,
    peft_adapter,
    tensors,
    theirs,
    write_meta,
    write_own,
)
from helpers.converting import converted
from helpers.models import CPU, change_json, relative
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_tokenizer_llama3 import files
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_ft import cli
from llama_ft.config import SCHEMAS, ModelConfig, PlanConfig, TrainConfig, UserError, config_dir
from llama_ft.config.train import read_config
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.model.checkpoint import open_checkpoint
from llama_ft.model.folder import sizes_of
from llama_ft.model.mapped import read_pth
from llama_ft.model.sizes import hf_config, hf_sizes, meta_params, meta_sizes
from llama_ft.model.weights import build
from llama_ft.techniques.adapter import Adapters, load_adapter
from llama_ft.techniques.lora import LoRALinear, add_lora, lora_layers
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.techniques.peft import save_adapter
from llama_ft.training.saver import save_trained
from llama_ft.training.setup import set_up

__all__ = ["converted", "files"]  # fixtures


def pth(folder: Path) -> list[dict[str, Tensor]]:
    """The shards of a folder in Meta's format, as torch reads them."""
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("consolidated.*.pth"))]


ALL_LINEAR = [(name, "all_linear") for name in ("llama3_1", "qwen2", "qwen3")]


# Round trips


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TO_META)
def test_hf_to_meta_to_hf(tmp_path, converted, name, dtype, n_shards):
    first = hf_folder(name, dtype, sharded=n_shards > 1)
    converted(f"checkpoint={first}", "to=meta", f"output={tmp_path / 'meta'}", f"shards={n_shards}")
    assert len(pth(tmp_path / "meta")) == n_shards
    converted(f"checkpoint={tmp_path / 'meta'}", "to=hf", f"output={tmp_path / 'hf'}", f"shards={n_shards}")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == n_shards
    assert are_equal(tensors(first), tensors(tmp_path / "hf"))


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("name", TO_META)
def test_meta_to_hf_to_meta(tmp_path, converted, name, n_shards):
    first = write_meta(name, tmp_path / "first", n_shards)
    converted(f"checkpoint={first}", "to=hf", f"output={tmp_path / 'hf'}", "shards=2")
    assert are_equal(tensors(tmp_path / "hf"), tensors(hf_folder(name)))
    converted(f"checkpoint={tmp_path / 'hf'}", "to=meta", f"output={tmp_path / 'meta'}", f"shards={n_shards}")
    assert all(map(are_equal, pth(tmp_path / "meta"), pth(first)))
    assert len(pth(tmp_path / "meta")) == n_shards


def test_files_are_as_their_libraries_write_them(tmp_path, converted):
    converted(f"checkpoint={hf_folder('gqa')}", "to=meta", f"output={tmp_path / 'meta'}", "shards=3")
    for file in (tmp_path / "meta").glob("*.pth"):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None  # checksums included
        mapped = torch.load(file, weights_only=True, mmap=True)
        assert are_equal(mapped, torch.load(file, weights_only=True))
        assert all(stored.offset % 64 == 0 for stored in read_pth(file).values())
    mixed = tensors(hf_folder("mha")) | {"model.norm.weight": torch.ones(96, dtype=torch.float16)}
    shutil.copytree(hf_folder("mha"), tmp_path / "mixed")
    save_file(mixed, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    converted(f"checkpoint={tmp_path / 'mixed'}", "to=hf", f"output={tmp_path / 'hf'}")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert are_equal(tensors(tmp_path / "hf"), mixed)
    # The widest first, as safetensors has it, so that each is aligned.
    sizes = {(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("hf", "mixed")}
    assert len(sizes) == 1


PUBLISHED = {"llama2_7b": (None, 256), "llama2_70b": (1.3, 4096), "llama3_8b": (1.3, 1024), "llama3_2_1b": (1.5, 256)}


OTHERS = ["llama2_13b", "llama3_1_8b", "llama3_2_3b", "tinyllama_1b", "mistral_7b", "qwen2_5_7b", "qwen3_8b"]


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_params_and_config_say_a_models_sizes(tmp_path, name):
    cli.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        model = OmegaConf.to_object(compose("plan", [f"model={name}"])).model
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model, "bfloat16", 1, 2)))
    read = [hf_sizes(tmp_path / "config.json")]
    if name.startswith("qwen"):
        with pytest.raises(UserError, match=r"Meta's format does not support qk.*: write this model with to=hf"):
            meta_params(model)
    else:
        params = meta_params(model)
        (tmp_path / "params.json").write_text(json.dumps(params))
        read.append(meta_sizes(tmp_path / "params.json", math.nan))
    for sizes in read:
        assert all(getattr(model, key) == value for key, value in sizes.items())
    if name in PUBLISHED:
        assert (params.get("ffn_dim_multiplier"), params["multiple_of"]) == PUBLISHED[name]


@pytest.mark.parametrize("dim", [8, 64, 4096])
def test_any_width_can_be_said_in_metas_terms(tmp_path, dim):
    for ffn_dim in (*range(1, 300), 10001, 11008, 2**24):
        params = meta_params(ModelConfig("any", dim=dim, n_heads=4, n_kv_heads=4, ffn_dim=ffn_dim))
        (tmp_path / "params.json").write_text(json.dumps(params))
        assert meta_sizes(tmp_path / "params.json", 8.0)["ffn_dim"] == ffn_dim


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_has_the_same_logits_there_and_here(tmp_path, converted, name):
    n_tensors = len(tensors(hf_folder(name)))
    converted(f"checkpoint={hf_folder(name)}", "to=hf", f"output={tmp_path / 'hf'}", f"shards={n_tensors}")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == n_tensors
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(written) is type(theirs(name))
    assert_same(ours(tmp_path / "hf"), written)
    if name in TO_META:
        converted(f"checkpoint={hf_folder(name)}", "to=meta", f"output={tmp_path / 'meta'}")
        # What the context is, Meta's files do not say; and by how much Llama 3.2 scales, no more than 3.1.
        assert_same(ours(tmp_path / "meta", max_seq_len=256), theirs(name))


def test_a_model_from_its_folder(tmp_path):
    sizes = sizes_of(hf_folder("llama3_1"))
    expected = {"name": "llama3_1-hf", "dim": 96, "n_kv_heads": 3, "max_seq_len": 256, "rope_factor": 8.0}
    assert expected.items() <= sizes.items()
    meta = dict(sizes_of(write_meta("llama3_1", tmp_path / "meta", 3, by_rows=True)))
    assert (meta.pop("name"), meta.pop("max_seq_len")) == ("meta", 131072)
    assert meta == {key: sizes[key] for key in meta}


# Adapters


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("mha", "default"), *(("gqa", kind) for kind in ADAPTERS), ("tied", "with_head"), *ALL_LINEAR],
)
def test_an_adapter_of_peft(tmp_path, name, kind, merge):
    reference = peft_adapter(theirs(name), tmp_path / "adapter", kind)
    model, plain = ours(hf_folder(name)), ours(hf_folder(name))
    load_adapter(model, tmp_path / "adapter", merge)
    assert_same(model, reference)
    tokens = torch.arange(3, 100)[None]
    with torch.no_grad():
        assert relative(model(tokens), plain(tokens)) > 0.05


@pytest.mark.parametrize("name", ["mha", "gqa", "tied", "qwen2", "qwen3"])
@pytest.mark.parametrize(("targets", "rslora"), [(["wq", "wk"], True), (EVERYWHERE, False)])
def test_an_adapter_of_ours_in_peft_and_back(tmp_path, name, targets, rslora):
    model = ours(hf_folder(name))
    add_lora(model, 5, 12.0, 0.1, targets, rslora)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    (tmp_path / "ours").mkdir()
    (tmp_path / "again").mkdir()
    save_adapter(model, tmp_path / "ours", "somewhere")
    loaded = PeftModel.from_pretrained(theirs(name), tmp_path / "ours").eval()
    assert_same(model.eval(), loaded)
    loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = ours(hf_folder(name))
    load_adapter(again, tmp_path / "theirs", False)
    ours_now, before = lora_layers(again), lora_layers(model)
    assert ours_now.keys() == before.keys()
    for layer, adapted in ours_now.items():
        assert torch.equal(adapted.lora_A, before[layer].lora_A)
        assert torch.equal(adapted.lora_B, before[layer].lora_B)
        assert adapted.scale == before[layer].scale
    # The same files again, to the bit.
    save_adapter(again, tmp_path / "again", "somewhere")
    assert are_equal(*(load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "again")))


def test_an_adapter_of_an_old_peft_is_read(tmp_path):
    reference = peft_adapter(theirs("gqa"), tmp_path / "adapter", "default")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter" / "adapter_model.bin")
    file.unlink()
    model = ours(hf_folder("gqa"))
    load_adapter(model, tmp_path / "adapter")
    assert_same(model, reference)


def test_merging_and_taking_out_again():
    model, plain = ours(hf_folder("gqa")), ours(hf_folder("gqa"))
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
        assert relative(model(tokens), beside) <= 1e-5
    for name, layer in lora_layers(model).items():
        assert relative(layer.weight, plain.get_submodule(name).weight) <= 1e-6


def test_a_merged_16_bit_weight_is_rounded_once():
    linear = torch.nn.Linear(64, 48, bias=False).bfloat16()
    base = linear.weight.detach().clone()
    layer = LoRALinear(linear, 4, 8.0)
    torch.nn.init.normal_(layer.lora_B, std=0.01)
    exact = base.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge()
    assert (layer.weight == exact.float().bfloat16()).float().mean() > 0.999  # fp32's own rounding may tip a tie


def test_two_adapters_side_by_side(tmp_path):
    tokens, expected = torch.arange(3, 100)[None], {}
    for kind in ("default", "with_head"):
        reference = peft_adapter(theirs("tied"), tmp_path / kind, kind)
        with torch.no_grad():
            expected[kind] = reference(tokens).logits
    model = ours(hf_folder("tied"))
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
    assert now.keys() == weights.keys()
    for name, (pointer, weight) in weights.items():
        assert now[name].data_ptr() == pointer
        assert torch.equal(now[name], weight)
    with pytest.raises(UserError, match="there is no such folder"):
        adapters.add("third", tmp_path / "third")
    assert "third" not in adapters


# Adapters that are trained further


def further(adapter: Path, *arguments: str, optim: str = "lora", base: Path | None = None) -> TrainConfig:
    source = f"checkpoint='{base or hf_folder('gqa')}'", "model=from_checkpoint", "tokenizer=any", "gpu=cpu"
    return cli.composed_config("train", [*source, f"optim={optim}", f"adapter='{adapter}'", *arguments], TrainConfig)


@pytest.mark.parametrize(("name", "kind"), [("gqa", "default"), ("gqa", "all_linear"), ("tied", "with_head")])
def test_an_adapter_is_trained_further_from_where_it_was(tmp_path, name, kind):
    """Its numbers are taken from it; the model begins as PEFT's, and goes on with other data."""
    reference = peft_adapter(theirs(name), tmp_path / "adapter", kind)
    config = further(tmp_path / "adapter", "lora.dropout=0", "optim.gc=true", base=hf_folder(name))
    said = reference.peft_config["default"]
    assert (config.lora.rank, config.lora.alpha, config.lora.rslora) == (said.r, said.lora_alpha, said.use_rslora)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    step = set_up(read_config(tmp_path / "config.yaml"), Precision("cpu", torch.float32), CPU)
    assert {key.rpartition(".")[2] for key, p in step.model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    tokens = torch.arange(3, 100)[None]
    with torch.no_grad():
        assert relative(step.model(tokens), reference(tokens).logits) <= 1e-5
    assert config.hash() != further(tmp_path / "adapter", "lora.dropout=0.1", base=hf_folder(name)).hash()


def test_the_adapter_is_part_of_what_a_run_is(tmp_path):
    peft_adapter(theirs("gqa"), tmp_path / "adapter", "default")
    before = further(tmp_path / "adapter").hash()
    shutil.copytree(tmp_path / "adapter", tmp_path / "moved")
    assert further(tmp_path / "moved").hash() == before
    change_json(tmp_path / "moved" / "adapter_config.json", lora_alpha=31)
    assert further(tmp_path / "moved").hash() != before


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("default", {"optim": "mp"}, "adapter=DIR needs LoRA, and optim.lora is off: give optim=lora"),
        ("default", ("lora.rank=8",), r"lora.rank=8 differs from 16 of adapter=.*: leave it out"),
        ("default", ("lora.targets=[wv,wk]",), r"lora.targets=\['wv', 'wk'\] differs from \['wq', 'wv'\] of adapter="),
        ("patterns", (), "has layers or ranks of several kinds, so it cannot be trained further: merge it"),
        ("some_layers", (), "has layers or ranks of several kinds"),
    ],
)
def test_what_cannot_be_trained_further_is_said(tmp_path, kind, arguments, message):
    peft_adapter(theirs("gqa"), tmp_path / "adapter", kind)
    typed, named = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
    with pytest.raises(UserError, match=message):
        further(tmp_path / "adapter", *typed, **named)
    if kind == "default":
        further(tmp_path / "adapter", "lora.targets=[wv,wq]", "lora.rank=16")  # what it has may be said


# Merged exports


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gqa", "all_linear"), ("gqa", "patterns"), ("tied", "with_head"), *ALL_LINEAR],
)
def test_a_merged_export(tmp_path, converted, name, kind):
    reference = peft_adapter(theirs(name), tmp_path / "adapter", kind)
    source = f"checkpoint={hf_folder(name)}", f"adapter={tmp_path / 'adapter'}"
    converted(*source, "to=hf", f"output={tmp_path / 'merged'}")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same(ours(tmp_path / "merged"), merged)
    tokens = torch.arange(3, 100)[None]
    with torch.no_grad():
        assert relative(merged(tokens).logits, reference(tokens).logits) <= 1e-5
    assert merged.config.tie_word_embeddings is (name == "qwen2")  # a head that is adapted is tied no more
    if name == "tied":  # PEFT merges the head into the embedding too, and says so
        return
    theirs_merged = reference.merge_and_unload().state_dict()
    written = tensors(tmp_path / "merged")
    assert all(relative(tensor, theirs_merged[weight]) <= 1e-6 for weight, tensor in written.items())
    converted(*source, "to=hf", f"output={tmp_path / 'rounded'}", "dtype=bf16")
    assert are_equal(tensors(tmp_path / "rounded"), {key: tensor.bfloat16() for key, tensor in written.items()})


def test_what_a_run_left_of_a_close_relative_is_exported(tmp_path, converted):
    """Of its own files alone, whose metadata say the features."""
    for name in ("qwen2", "qwen3"):
        (folder := tmp_path / name).mkdir()
        model = ours(hf_folder(name))
        save_trained(model, folder)
        converted(f"checkpoint={folder}", "to=hf", f"output={folder / 'hf'}")
        written = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
        assert type(written) is type(theirs(name))
        assert_same(ours(folder), written)
    both = replace(config_of("qwen3"), qkv_bias=True)
    with pytest.raises(UserError, match="no model_type of Hugging Face has qkv_bias and qk_norm"):
        hf_config(both, "float32", 1, 2)


def test_what_a_run_left_is_exported(tmp_path, converted):
    converted(f"checkpoint={write_own('gqa', tmp_path / 'run')}", "to=hf", f"output={tmp_path / 'hf'}")
    assert are_equal(tensors(tmp_path / "hf"), tensors(hf_folder("gqa")))
    assert_same(ours(tmp_path / "hf"), AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval())


def test_the_built_in_model_with_its_tokenizer(tmp_path, converted):
    converted("model=tiny", "to=hf", f"output={tmp_path / 'tiny'}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    reference = Tokenizer(tmp_path / "tiny" / "tokenizer.model")
    text = "### Instruction:\nName  a color. é\n\n### Response:"
    assert tokenizer(text).input_ids == reference.encode(text, bos=True)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert (model.config.bos_token_id, model.generation_config.eos_token_id) == (reference.bos_id, reference.eos_id)
    assert model.config.max_position_embeddings == 1024


def test_a_tokenizer_of_another_kind_is_copied_or_left_out(tmp_path, converted):
    source = tmp_path / "source"
    shutil.copytree(hf_folder("gqa"), source)
    (source / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "WordLevel"}}')
    (source / "tokenizer_config.json").write_text("{}")
    printed = converted(f"checkpoint={source}", "to=hf", f"output={tmp_path / 'hf'}")
    assert "its files are copied unchanged" in printed
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    printed = converted(f"checkpoint={source}", "to=meta", f"output={tmp_path / 'meta'}")
    assert "it is left out" in printed
    assert "the context of 256; it is read as 16,384: give model.max_seq_len=256 when using the files" in printed
    assert {file.name for file in (tmp_path / "meta").iterdir()} == {"consolidated.00.pth", "params.json"}


def test_settings_of_the_source_are_kept(tmp_path, converted):
    source = Path(shutil.copytree(hf_folder("gqa"), tmp_path / "source"))
    change_json(source / "config.json", eos_token_id=[7, 9], pretraining_tp=1)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    converted(f"checkpoint={source}", "to=hf", f"output={tmp_path / 'out'}", "dtype=fp16")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert {key for key in before | after if before.get(key) != after.get(key)} == {"dtype"}
    assert after["dtype"] == "float16"
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"temperature": 0.6}'


def test_settings_of_quantization_are_not_those_of_plain_weights(tmp_path, converted):
    source = Path(shutil.copytree(hf_folder("gqa", torch.bfloat16), tmp_path / "source"))
    change_json(source / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    converted(f"checkpoint={source}", "to=hf", f"output={tmp_path / 'out'}")
    assert_same(ours(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval())


@pytest.mark.parametrize(
    ("config_end", "generation_end", "written"),
    [(1, None, 2), (1, 1, 2), (2, [7, 2], [7, 2]), ([5, 1], None, [2, 5]), (None, 9, [2, 9])],
)
def test_the_export_ends_where_the_tokenizer_does(tmp_path, converted, config_end, generation_end, written):
    """The conversion of LLaMA that most people used had the ids 0 and 1, and the tokenizer has 1 and 2."""
    source, out = tmp_path / "source", tmp_path / "out"
    LlamaForCausalLM(LlamaConfig(**(SIZES | MODELS["gqa"] | {"vocab_size": 2048}))).save_pretrained(source)
    shutil.copy(CHECKOUT / "llama_ft" / "model" / "tiny" / "tokenizer.model", source)
    change_json(source / "config.json", bos_token_id=0, eos_token_id=config_end)
    (source / "generation_config.json").unlink()
    if generation_end is not None:
        ends = {"bos_token_id": 1, "eos_token_id": generation_end, "temperature": 0.6, "do_sample": True}
        (source / "generation_config.json").write_text(json.dumps(ends))
    said = converted(f"checkpoint={source}", "to=hf", f"output={out}")
    assert "config.json and the tokenizer disagree: bos_token_id=0, now 1" in said
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.bos_token_id, model.generation_config.eos_token_id) == (1, written)
    assert model.generation_config.temperature == (None if generation_end is None else 0.6)


def test_a_tokenizer_json_ends_texts_alike_in_every_format(tmp_path, converted, files):
    """Where config.json alone names the end."""
    source = tmp_path / "source"
    LlamaForCausalLM(LlamaConfig(**(SIZES | MODELS["gqa"] | {"vocab_size": 556}))).save_pretrained(source)
    content = (
        files.json.read_text(encoding="utf-8").replace("<|begin_of_text|>", "<b>").replace("<|end_of_text|>", "<e>")
    )
    (source / "tokenizer.json").write_text(content, encoding="utf-8")
    change_json(source / "config.json", bos_token_id=300, eos_token_id=301)
    before = source
    for to in ("meta", "hf"):
        converted(f"checkpoint={before}", f"to={to}", f"output={tmp_path / to}")
        tokenizer = Tokenizer(tmp_path / to / "tokenizer.json")
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (300, 301, {301})
        before = tmp_path / to
    theirs = AutoTokenizer.from_pretrained(before)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (300, 301)


@pytest.mark.parametrize("name", ["gqa", "mistral"])
def test_sizes_that_are_given_are_written(tmp_path, converted, name):
    out = tmp_path / "out"
    converted(
        f"checkpoint={hf_folder(name)}", "to=hf", f"output={out}", "model.rope_theta=30000", "model.norm_eps=1e-3"
    )
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.rms_norm_eps == 1e-3
    assert type(model) is type(theirs(name))
    assert sizes_of(out)["rope_theta"] == 30000.0
    assert_same(ours(out), model)


def test_bos_and_eos_are_those_of_the_released_models_where_nothing_says_them(tmp_path, converted):
    write_meta("gqa", tmp_path / "meta")
    said = converted(f"checkpoint={tmp_path / 'meta'}", "to=hf", f"output={tmp_path / 'llama2'}")
    assert "no tokenizer is given: BOS and EOS are assumed to be 1 and 2, as in the released models" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama2")
    assert (model.generation_config.bos_token_id, model.config.eos_token_id) == (1, 2)


def test_a_run_is_the_same_wherever_its_checkpoint_lies(tmp_path):
    hashes = set()
    for name in ("one", "models--owner--Some-LLaMA/snapshots/0123abcd", "tiny"):
        shutil.copytree(hf_folder("gqa"), tmp_path / name)
        shutil.copy(CHECKOUT / "llama_ft" / "model" / "tiny" / "tokenizer.model", tmp_path / name)
        arguments = ["model=from_checkpoint", f"checkpoint='{tmp_path / name}'", "gpu=cpu"]
        config = cli.composed_config("plan", arguments, PlanConfig)
        hashes.add(config.hash())
        expected = {"one": "one", "tiny": "tiny-checkpoint"}.get(name, "Some-LLaMA")
        assert config.model.name == expected
        assert config.tokenizer_file == tmp_path / name / "tokenizer.model"
    assert len(hashes) == 1


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "plan"])
@pytest.mark.parametrize("model", ["from_checkpoint", "tiny"])
def test_keys_that_are_given_win_over_the_checkpoint_in_every_command(tmp_path, command, model):
    folder = hf_folder("gqa")
    sizes = {"rope_theta": 30000.0} | ({} if model == "from_checkpoint" else vars(config_of("gqa")))
    given = [f"model.{key}={json.dumps(value)}" for key, value in sizes.items() if key not in ("name", "given")]
    source = [f"model={model}", f"checkpoint='{folder}'", "tokenizer=any", "gpu=cpu"]
    asked = ["prompt=x"] if command == "generate" else []
    config = cli.composed_config(command, source + given + asked, SCHEMAS[command])
    assert config.model.rope_theta == sizes["rope_theta"]
    open_checkpoint(folder, build(config.model))
    if command == "train":  # the run's own process reads it again
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        open_checkpoint(folder, build(read_config(tmp_path / "config.yaml").model))


@pytest.mark.process
def test_a_run_on_a_llama_3_2_of_which_only_the_folder_is_named(tmp_path, files):
    """Trained by the command, its adapter loaded by PEFT; the tokenizer is the one in the folder."""
    scaling = LLAMA_3_1 | {"factor": 32.0, "original_max_position_embeddings": 8192}
    sizes: dict[str, Any] = SIZES | {"vocab_size": 556, "max_position_embeddings": 2048, "num_key_value_heads": 3}
    config = LlamaConfig(**(sizes | {"rope_theta": 5e5}), rope_scaling=scaling, tie_word_embeddings=True)
    folder = tmp_path / "Small 3.2"
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(files.json, folder)
    arguments = ("model=from_checkpoint", f"checkpoint='{folder.name}'", "optim=lora", "lora.targets=[wq,wk,w2]")
    settings = ("training.max_samples=4", "training.lr=0.1", "tracker=disabled", "hydra.run.dir=run")
    done = run("llama_ft.train", *arguments, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ends = "<|end_of_text|> (301); config.json says 2; generation_config.json says 2"  # LlamaConfig's own
    assert f"tokenizer: texts begin with <|begin_of_text|> (300), end with {ends}\n" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["model"], result["status"]) == ("Small_3.2", "ok")
    trained = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / "run").eval()
    model = ours(folder)
    load_adapter(model, tmp_path / "run")
    assert_same(model, trained)
    with torch.no_grad():
        tokens = torch.arange(3, 100)[None]
        assert relative(model(tokens), LlamaForCausalLM.from_pretrained(folder)(tokens).logits) > 0.01
