"""What `convert` refuses, and that it then leaves nothing behind; what its process needs in memory."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, environment, run
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from safetensors.torch import load_file, save_file
from test_checkpoint import Code, with_odd_values
from test_convert import Command, Folders, command, folders, ours, peft_adapter, tensors, theirs
from torch import Tensor

from llama_ft import cli
from llama_ft.config import ConvertConfig, ModelConfig, UserError, config_dir
from llama_ft.model import writing
from llama_ft.model.folder import sizes_of
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import save_tensors
from llama_ft.techniques.adapter import load_adapter
from llama_ft.techniques.peft import read_adapter

__all__ = ["command", "folders"]  # fixtures
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path, folders: Folders) -> Path:
    """A checkpoint in several files, to be damaged."""
    return Path(shutil.copytree(folders("gqa", sharded=True), tmp_path / "source"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of PEFT's, to be damaged."""
    peft_adapter(theirs("gqa"), tmp_path / "adapter", "default")
    return tmp_path / "adapter"


@pytest.fixture
def refused(command: Command, tmp_path: Path) -> Callable[..., str]:
    """The reason for which a conversion is refused, of which nothing is left."""

    def reason(checkpoint: Path, *arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as caught:
            command(f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", *(arguments or ("to=meta",)))
        assert sorted(tmp_path.rglob("*")) == before
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return reason


Refused = Callable[..., str]


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# Damaged and hostile sources


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, refused: Refused, source: Path, adapter: Path) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    torch.save({"output.weight": Code(tmp_path / "run")}, meta / "consolidated.00.pth")
    params = {"dim": 96, "n_layers": 2, "n_heads": 6, "vocab_size": 120}
    (meta / "params.json").write_text(json.dumps(params))
    assert "posix.system" in refused(meta, "to=hf")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": Code(tmp_path / "run")}, adapter / "adapter_model.bin")
    assert "posix.system" in refused(source, "to=hf", f"adapter={adapter}")
    assert not (tmp_path / "run").exists()


def test_damaged_sources(refused: Refused, source: Path, tmp_path: Path) -> None:
    first, *others = sorted(source.glob("*.safetensors"))
    whole, index = first.read_bytes(), json.loads((source / INDEX).read_text())
    first.write_bytes(whole[:100])
    assert f"{first} is not a safetensors file, or is damaged: its header cannot be read" in refused(source)
    first.write_bytes(whole[:-1])
    assert "it was not downloaded or copied completely" in refused(source)
    first.unlink()
    assert f"1 of {1 + len(others)} files are missing: {first.name}" in refused(source)
    first.write_bytes(whole)
    more = index["weight_map"] | {"model.layers.1.more.weight": first.name}
    (source / INDEX).write_text(json.dumps(index | {"weight_map": more}))
    assert f"{first} does not hold model.layers.1.more.weight" in refused(source)
    less = {name: file for name, file in index["weight_map"].items() if "norm" not in name}
    (source / INDEX).write_text(json.dumps(index | {"weight_map": less}))
    assert "5 tensors are missing, such as model.layers.0.input_layernorm.weight" in refused(source)
    (source / INDEX).write_text(json.dumps(index))
    change_json(source / "config.json", intermediate_size=200)
    assert "gate_proj.weight is [192, 96], and should be [200, 96]" in refused(source)
    (source / "config.json").unlink()
    assert "there is no config.json or params.json in it" in refused(source)
    assert "there is no such folder" in refused(tmp_path / "nowhere")


def test_a_head_that_is_not_the_embedding(refused: Refused, source: Path, folders: Folders, tmp_path: Path) -> None:
    change_json(source / "config.json", tie_word_embeddings=True)
    message = refused(source)
    assert "lm_head.weight and model.embed_tokens.weight differ" in message
    assert "tie_word_embeddings=true says that they are one" in message
    # A copy of it is allowed, as older versions of transformers wrote it.
    tied = Path(shutil.copytree(folders("tied"), tmp_path / "tied"))
    weights = load_file(tied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tied / "model.safetensors")
    assert ours(tied).output.weight is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mistral"}, "model_type=mistral is not supported, it must be llama"),
        ({"hidden_size": None}, "does not say the model's dim as a number"),
        ({"hidden_size": 96.5}, "its model.dim is 96.5, which cannot be"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
            "model.dim=96 is not allowed: it must be a multiple of model.n_heads=5",
        ),
        ({"num_hidden_layers": 0}, "model.n_layers=0 is not allowed"),
        (
            {"num_hidden_layers": 10**7},
            "model.n_layers=10000000 is not allowed: it must be at least 1 and at most 4,096",
        ),
        ({"hidden_size": 10**400}, "model.dim=1000"),
        ({"vocab_size": 10**30}, "model.vocab_size=1000"),
        ({"head_dim": 10**30}, "model.head_size=1000"),
        ({"max_position_embeddings": 10**20}, "model.max_seq_len=1000"),
        ({"head_dim": 15}, "model.head_size=15 is not allowed: it must be positive and even"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "of type yarn are not supported, only default"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "does not say the model's rope_low_freq_factor"),
    ],
)
def test_models_that_are_not_llama(refused: Refused, source: Path, values: dict[str, Any], message: str) -> None:
    change_json(source / "config.json", **values)
    assert message in refused(source)


def in_a_line(function: Callable[[], object]) -> bool:
    """Whether it is refused; any other end than a UserError in a line is an error."""
    try:
        function()
    except UserError as error:
        message = str(error)
    else:
        return False
    assert len(message.splitlines()) == 1
    return True


def test_odd_values_in_config_json(source: Path) -> None:
    """Whatever it holds, it is a model or refused in a line."""
    content, arguments = json.loads((source / "config.json").read_text()), [f"checkpoint={source}", "to=hf", "output=x"]
    cli.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        composed = compose("convert", arguments)
    kept = {key: content.pop(key) for key in ("hidden_size", "num_attention_heads", "head_dim", "rope_parameters")}
    refused = []
    for odd in with_odd_values(kept | {"tie_word_embeddings": False}):
        (source / "config.json").write_text(json.dumps(content | odd if isinstance(odd, dict) else odd))
        refused.append(in_a_line(lambda: cli.checked_config(composed, arguments, ConvertConfig)))
    assert 10 < sum(refused) < len(refused) - 10


def test_a_hostile_name_in_our_own_metadata(tmp_path: Path, folders: Folders) -> None:
    """It would be part of a path, or stand for a model that ships with the package."""
    (tmp_path / "own").mkdir()
    for name in ("x/../../evil", "tiny", 5):
        sizes = json.dumps({"dim": 64, "n_layers": 1, "name": name})
        save_file({"norm.weight": torch.ones(64)}, tmp_path / "own" / "model.safetensors", {"llama_ft.model": sizes})
        assert sizes_of(tmp_path / "own") == {"name": "own", "dim": 64, "n_layers": 1}


def test_metas_embedding_that_is_no_matrix(tmp_path: Path, refused: Refused) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "params.json").write_text(json.dumps({"dim": 96, "n_layers": 2, "n_heads": 6, "vocab_size": -1}))
    for tensor, message in ((torch.ones(()), "or it is no matrix"), (torch.ones(0, 96), "model.vocab_size=0 is not")):
        torch.save({"tok_embeddings.weight": tensor}, meta / "consolidated.00.pth")
        assert message in refused(meta, "to=hf")
    torch.save({"tok_embeddings.weight": torch.ones([1] * 9)}, meta / "consolidated.00.pth")
    assert "there is a tensor of shape" in refused(meta, "to=hf")


def test_no_table_is_made_of_a_model_that_is_only_looked_at() -> None:
    with torch.device("meta"):
        assert Transformer(ModelConfig("long", max_seq_len=2**24)).rotary.is_meta


def test_numbers_beyond_the_range_of_fp16(tmp_path: Path, folders: Folders, refused: Refused) -> None:
    source = Path(shutil.copytree(folders("gqa"), tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, source / "model.safetensors")
    message = refused(source, "to=hf", "dtype=fp16")
    assert message == "layers.1.feed_forward.w3.weight has numbers beyond the range of float16: give dtype=bf16"


def test_sizes_that_meta_does_not_know(refused: Refused, folders: Folders) -> None:
    assert "Meta's format knows no head_dim=32 other than dim / n_heads" in refused(folders("wide_heads"))
    assert "knows no rope_original_context=0" in refused(folders("linear"))
    assert "knows no rope_original_context=64" in refused(folders("scaled"))
    assert "shards=4 is not allowed: it must divide model.n_heads=6" in refused(folders("gqa"), "to=meta", "shards=4")
    assert "shards=1000 is not allowed: it must be at most 21" in refused(folders("gqa"), "to=hf", "shards=1000")


# Adapters


def test_adapters_that_cannot_be_used(
    refused: Refused, source: Path, adapter: Path, folders: Folders, tmp_path: Path
) -> None:
    def refused_adapter(folder: Path = adapter) -> str:
        return refused(source, "to=hf", f"adapter={folder}")

    assert "there is no such folder" in refused_adapter(tmp_path / "nowhere")
    assert f"its model.safetensors is a whole model: give checkpoint={folders('gqa')}" in refused_adapter(
        folders("gqa")
    )
    peft_adapter(theirs("mha"), tmp_path / "other", "default")
    message = refused_adapter(tmp_path / "other")
    assert (
        "v_proj.lora_B is [96, 16], and for model=source and r=16 should be [48, 16]: it is an adapter of another"
        in message
    )
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    damaged: list[tuple[dict[str, Tensor], str]] = [
        ({}, "there is no lora_A or lora_B in it"),
        ({n: t for n, t in whole.items() if n != name}, "layers.0.self_attn.q_proj has no lora_A in it"),
        (
            whole | {name.replace("layers.0", "layers.7"): whole[name].clone()},
            "belongs to no linear layer of model=source",
        ),
        (whole | {name.replace("q_proj", "qkv"): whole[name].clone()}, "belongs to no linear layer of model=source"),
        (whole | {"base_model.model.score.weight": torch.ones(2, 2)}, "is no part of a LoRA adapter of a linear layer"),
        (whole | {name.replace("_A", "_embedding_A"): torch.ones(2, 2)}, "is no part of a LoRA adapter"),
        (
            whole | {"base_model.model.lm_head.weight": torch.ones(120, 96)},
            "holds output.weight too, which differs",
        ),
    ]
    for content, expected in damaged:
        save_file(content, file)
        assert expected in refused_adapter()
    save_file(whole, file)
    (adapter / "adapter_config.json").unlink()
    assert "there is no adapter_config.json in it, which says how the adapter is scaled" in refused_adapter()
    file.unlink()
    assert "there is no adapter_model.safetensors in it; give the folder of a run with LoRA" in refused_adapter()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "says peft_type=LOHA, and only LORA can be used"),
        ({"use_dora": True}, "says use_dora=True, which is not supported"),
        ({"bias": "all"}, "says bias=all, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "says modules_to_save=['lm_head'], which is not supported"),
        ({"fan_in_fan_out": True}, "says fan_in_fan_out=True, which is not supported"),
        ({"of_the_future": {"a": 1}}, "says of_the_future={'a': 1}, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "such an adapter belongs to weights that differ"),
        ({"r": 8}, "lora_A is [16, 96], and for model=gqa-hf and r=8 should be [8, 96]"),
        ({"r": None}, "r is None, and must be a positive number"),
        ({"lora_alpha": "32"}, "lora_alpha is 32, and must be a positive number"),
        ({"use_rslora": 1}, "use_rslora must be true or false"),
        ({"rank_pattern": {"q_proj(": 4}}, "rank_pattern has q_proj(: "),
        ({"alpha_pattern": {"q_proj": -1}}, "lora_alpha of q_proj is -1, and must be a positive number"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be an object of patterns and numbers"),
    ],
)
def test_adapters_of_other_kinds(adapter: Path, folders: Folders, values: dict[str, Any], message: str) -> None:
    change_json(adapter / "adapter_config.json", **values)
    with pytest.raises(UserError) as caught:
        load_adapter(ours(folders("gqa")), adapter, True)
    assert message in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_odd_values_in_adapter_config(adapter: Path, folders: Folders) -> None:
    config, file = ModelConfig(**sizes_of(folders("gqa"))), adapter / "adapter_config.json"
    content, refused = json.loads(file.read_text()), []
    for odd in with_odd_values(content | {"rank_pattern": {"q_proj": 16}}):
        file.write_text(json.dumps(odd))
        refused.append(in_a_line(lambda: read_adapter(adapter, config)))
    assert 100 < sum(refused) < len(refused) - 100


def test_an_adapter_of_the_head_that_came_with_other_weights(
    tmp_path: Path, folders: Folders, refused: Refused
) -> None:
    peft_adapter(theirs("gqa"), tmp_path / "adapter", "with_head")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    content = load_file(file)
    (copied,) = [name for name in content if name.endswith("lm_head.base_layer.weight")]
    content[copied][0, 0] += 1
    save_file(content, file)
    message = refused(folders("gqa"), "to=hf", f"adapter={tmp_path / 'adapter'}")
    assert "holds output.weight too, which differs from the checkpoint's" in message


# What the user types


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "model=from_checkpoint takes its sizes from a folder: give checkpoint=DIR"),
        (("model=tiny", "output=x"), "give to=hf or to=meta"),
        (("model=tiny", "to=hf"), "give output=DIR"),
        (("model=tiny", "to=gguf", "output=x"), "to=gguf is not allowed: it must be one of hf, meta"),
        (("model=tiny", "to=hf", "output=x", "shards=0"), "shards=0 is not allowed: it must be between 1 and 1000"),
        (("model=tiny", "to=hf", "output=x", "checkpoint=random"), "there are no weights to convert"),
        (("model=llama2_7b", "to=hf", "output=x"), "give checkpoint=DIR"),
        (("checkpoint=random", "to=hf", "output=x"), "takes its sizes from a folder"),
        (("model=tiny", "to=hf", "output=x", "dtype=int8"), "dtype=int8 is not allowed"),
        (("model=tiny", "to=hf", "output=x", "adapter=nowhere"), "adapter=nowhere: there is no such folder"),
        (("model=tiny", "to=hf", "output=x", "tokenizer=nowhere"), "tokenizer=nowhere: there is no such file"),
    ],
)
def test_the_likeliest_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, HydraException)) as caught:
        command(*arguments)
    explained = cli.explain(caught.value, ConvertConfig)
    assert message in explained
    assert explained.count(message.rpartition(": ")[2]) == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, command: Command) -> None:
    for name in ("file", "folder/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match="is there already, and nothing is overwritten"):
            command("model=tiny", "to=hf", f"output={tmp_path / name.split('/')[0]}")
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(UserError, match=r"output=.*/file/deeper cannot be written: "):
        command("model=tiny", "to=hf", f"output={tmp_path / 'file' / 'deeper'}")
    (tmp_path / "empty").mkdir()
    for name, target in (("to_empty", "empty"), ("dangling", "nowhere"), ("loop", "loop")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(UserError, match="is there already, and nothing is overwritten"):
            command("model=tiny", "to=hf", f"output={tmp_path / name}")
        (tmp_path / name).unlink()
    command("model=tiny", "to=hf", f"output={tmp_path / 'empty'}")
    assert (tmp_path / "empty" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder"]


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_disk_that_gets_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, to: str) -> None:
    pieces = 0

    def full(rows: Tensor) -> memoryview:
        nonlocal pieces
        pieces += 1
        if pieces > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(rows)

    written = writing.as_bytes
    monkeypatch.setattr(writing, "as_bytes", full)
    with pytest.raises(UserError, match=r"output=.*out cannot be written: No space left on device"):
        command("model=tiny", f"to={to}", f"output={tmp_path / 'out'}")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match=r"7 MiB are needed, and 1 MiB are free there"):
        command("model=tiny", f"to={to}", f"output={tmp_path / 'out'}")


# The process


SLOW = """
import time
from llama_ft.model import writing
write = writing.as_bytes
def as_bytes(rows):
    print("writing", flush=True)
    time.sleep(1)
    return write(rows)
writing.as_bytes = as_bytes
from llama_ft import convert, cli
cli.run_command(convert.main, convert.USAGE)
"""


def test_the_folder_that_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert " in .\n" in command("model=tiny", "to=hf", "output=.")
    assert (tmp_path / "here" / "config.json").is_file()


def test_tokenizers_are_known_by_what_is_in_them(tmp_path: Path, folders: Folders, command: Command) -> None:
    file = tmp_path / "any.json"
    shutil.copy(CHECKOUT / "llama_ft" / "model" / "tiny" / "tokenizer.model", file)
    command("model=tiny", "to=meta", f"output={tmp_path / 'out'}", f"tokenizer={file}")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["model=tiny", "to=hf", f"output={tmp_path / 'out'}"]
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []


def peak_rss(*arguments: str, cwd: Path) -> int:
    """Bytes that a conversion had resident at its worst."""
    child = subprocess.Popen(
        [sys.executable, "-m", "llama_ft.convert", *arguments], cwd=cwd, env=environment(), stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    assert status == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_no_more_than_pieces_is_in_memory(tmp_path: Path) -> None:
    """A tenth of the model, at most, beside what the process needs for a small one; benchmarks/ has 2 GiB."""
    config = ModelConfig("large", dim=1024, n_layers=4, n_heads=8, n_kv_heads=8, ffn_dim=2816, vocab_size=6000)
    names = {"tok_embeddings": [6000, 1024], "output": [6000, 1024], "norm": [1024]}
    for layer in range(4):
        names |= {f"layers.{layer}.attention.{w}": [1024, 1024] for w in ("wq", "wk", "wv", "wo")}
        names |= {f"layers.{layer}.feed_forward.{w}": [2816, 1024] for w in ("w1", "w3")}
        names |= {f"layers.{layer}.feed_forward.w2": [1024, 2816]}
        names |= {f"layers.{layer}.{norm}": [1024] for norm in ("attention_norm", "ffn_norm")}
    (tmp_path / "own").mkdir()
    save_tensors(
        {f"{name}.weight": torch.ones(shape) for name, shape in names.items()},
        tmp_path / "own" / "model.safetensors",
        config,
    )
    n_bytes = (tmp_path / "own" / "model.safetensors").stat().st_size
    small = peak_rss("model=tiny", "to=hf", "output=tiny", cwd=tmp_path)
    for arguments in (
        ("checkpoint=own", "to=meta", "output=meta", "shards=4"),
        ("checkpoint=meta", "to=hf", "output=hf", "shards=2"),
    ):
        assert peak_rss(*arguments, cwd=tmp_path) - small < 0.1 * n_bytes
    assert n_bytes > 240e6
    assert all((tensor == 1).all() for tensor in tensors(tmp_path / "hf").values())
    for name in ("own", "meta", "hf"):
        shutil.rmtree(tmp_path / name)  # pytest would keep them


def test_the_command_says_what_it_does(tmp_path: Path) -> None:
    done = run("llama_ft.convert", "model=tiny", "to=meta", "output=meta", "shards=2", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "Written: consolidated.00.pth, consolidated.01.pth, params.json, tokenizer.model in meta\n"
    assert re.fullmatch(
        r"llama_ft to Meta: 7 MiB from .*\nMeta's files do not say the context of 1,024.*\n", done.stderr
    )
    again = run("llama_ft.convert", "model=tiny", "to=meta", "output=meta", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "error: output=meta is there already, and nothing is overwritten: name another folder\n"
