"""What `convert` refuses, and that it then leaves nothing behind; what its process needs in memory."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, environment, run
from helpers.checkpoints import hf_folder, ours, peft_adapter, tensors, theirs
from helpers.converting import Converted, converted
from helpers.models import change_json
from hydra.errors import HydraException
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_ft import cli
from llama_ft.config import ConvertConfig, ModelConfig, UserError
from llama_ft.model import writing
from llama_ft.model.weights import build, save_tensors
from llama_ft.techniques.adapter import load_adapter
from llama_ft.techniques.peft_patterns import by_pattern

__all__ = ["converted"]  # a fixture


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(hf_folder("gqa"), tmp_path / "source"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of PEFT's, to be damaged."""
    peft_adapter(theirs("gqa"), tmp_path / "adapter", "default")
    return tmp_path / "adapter"


@pytest.fixture
def refused(converted: Converted, tmp_path: Path) -> Callable[..., str]:
    """The reason for which a conversion is refused, of which nothing is left."""

    def reason(checkpoint: Path, *arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as caught:
            converted(f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", *(arguments or ("to=meta",)))
        assert sorted(tmp_path.rglob("*")) == before
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return reason


# Sources that cannot be converted (tests/test_checkpoint.py has more)


def test_damaged_sources(refused, source, tmp_path):
    assert "there is no such folder" in refused(tmp_path / "nowhere")
    change_json(source / "config.json", intermediate_size=200)
    assert "gate_proj.weight is [192, 96], but should be [200, 96]" in refused(source)
    (source / "config.json").unlink()
    assert "there is no config.json or params.json in it" in refused(source)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "it was not downloaded or copied completely" in refused(source)


def test_a_head_that_is_not_the_embedding(refused, source, tmp_path):
    change_json(source / "config.json", tie_word_embeddings=True)
    message = refused(source)
    assert "lm_head.weight and model.embed_tokens.weight differ" in message
    assert "tie_word_embeddings=true says they are the same tensor" in message
    # A copy of it is allowed, as older versions of transformers wrote it.
    tied = Path(shutil.copytree(hf_folder("tied"), tmp_path / "tied"))
    weights = load_file(tied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tied / "model.safetensors")
    model = ours(tied)
    assert torch.equal(model.output.weight, weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 96.5}, "its model.dim is 96.5, which is not allowed"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "a multiple of model.n_heads=5"),
        ({"num_hidden_layers": 0}, "model.n_layers=0 is not allowed"),
        ({"head_dim": 15}, "model.head_size=15 is not allowed: it must be positive and even"),
    ],
)
def test_models_that_are_not_llama(refused, source, values, message):
    change_json(source / "config.json", **values)
    assert message in refused(source)


def test_no_table_is_made_of_a_model_that_is_only_looked_at():
    assert build(ModelConfig("long", max_seq_len=2**24)).rotary.is_meta


def test_numbers_beyond_the_range_of_fp16(refused, source):
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, source / "model.safetensors")
    message = refused(source, "to=hf", "dtype=fp16")
    assert message == "layers.1.feed_forward.w3.weight has numbers beyond the range of float16: give dtype=bf16"


@pytest.mark.parametrize("dtype", ["keep", "fp16"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none(refused, source, adapter, number, dtype):
    """Of the adapter, and of the weights themselves."""
    for file, name, said in (
        (adapter / "adapter_model.safetensors", A_FACTOR, "layers.0.self_attn.q_proj.lora_A"),
        (source / "model.safetensors", "model.layers.1.mlp.up_proj.weight", "layers.1.feed_forward.w3.weight"),
    ):
        good = load_file(file)
        bad = good | {name: good[name].clone()}
        bad[name][-1, -1] = number
        save_file(bad, file)
        message = refused(source, "to=hf", f"dtype={dtype}", f"adapter={adapter}")
        assert f"{said} has NaN or infinite numbers" in message
        save_file(good, file)


def test_sizes_that_meta_does_not_know(refused):
    assert "Meta's format does not support head_dim=32, only dim / n_heads" in refused(hf_folder("wide_heads"))
    assert "does not support rope_original_context=0" in refused(hf_folder("linear"))
    assert "does not support rope_original_context=64" in refused(hf_folder("scaled"))
    assert "shards=4 is not allowed: it must divide model.n_heads=6" in refused(hf_folder("gqa"), "to=meta", "shards=4")
    assert "shards=1000 is not allowed: it must be at most 21" in refused(hf_folder("gqa"), "to=hf", "shards=1000")


# Adapters

A_FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda factors: {key: tensor for key, tensor in factors.items() if key != name}


def with_factor(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda factors: factors | {name: torch.ones(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, "it has no lora_A or lora_B"),
        (without(A_FACTOR), "layers.0.self_attn.q_proj has no lora_A"),
        (with_factor(A_FACTOR.replace("s.0", "s.7"), 16, 96), "does not belong to a linear layer of model=source"),
        (with_factor(A_FACTOR.replace("q_proj", "qkv"), 16, 96), "does not belong to a linear layer of model=source"),
        (with_factor("base_model.model.score.weight", 2, 2), "is not part of a LoRA adapter of a linear layer"),
        (with_factor(A_FACTOR.replace("_A", "_embedding_A"), 2, 2), "is not part of a LoRA adapter"),
        (with_factor("base_model.model.lm_head.weight", 120, 96), "also holds output.weight, which differs"),
    ],
)
def test_adapters_that_are_damaged(refused, source, adapter, change, message):
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    assert message in refused(source, "to=hf", f"adapter={adapter}")


def test_folders_without_an_adapter_of_the_model(refused, source, adapter, tmp_path):
    def refused_adapter(folder: Path) -> str:
        return refused(source, "to=hf", f"adapter={folder}")

    assert "there is no such folder" in refused_adapter(tmp_path / "nowhere")
    assert f"is a whole model: give checkpoint={hf_folder('gqa')} and no adapter" in refused_adapter(hf_folder("gqa"))
    peft_adapter(theirs("mha"), tmp_path / "other", "default")
    expected = "v_proj.lora_B is [96, 16], but for model=source and r=16 should be [48, 16]: it is an adapter of"
    assert expected in refused_adapter(tmp_path / "other")
    (adapter / "adapter_config.json").unlink()
    assert "it has no adapter_config.json, which says how the adapter is scaled" in refused_adapter(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "it has no adapter_model.safetensors; give the folder of a run with LoRA" in refused_adapter(adapter)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "says peft_type=LOHA, but only LORA is supported"),
        ({"use_dora": True}, "says use_dora=True, which is not supported"),
        ({"bias": "all"}, "says bias=all, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "says modules_to_save=['lm_head'], which is not supported"),
        ({"fan_in_fan_out": True}, "says fan_in_fan_out=True, which is not supported"),
        ({"of_the_future": {"a": 1}}, "says of_the_future={'a': 1}, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "such an adapter belongs to weights that differ"),
        ({"r": 8}, "lora_A is [16, 96], but for model=gqa-hf and r=8 should be [8, 96]"),
        ({"r": None}, "is damaged: r: "),
        ({"lora_alpha": "much"}, "is damaged: lora_alpha: input should be a valid number"),
    ],
)
def test_adapters_of_other_kinds(adapter, values, message):
    change_json(adapter / "adapter_config.json", **values)
    with pytest.raises(UserError) as caught:
        load_adapter(ours(hf_folder("gqa")), adapter)
    assert message in str(caught.value)
    assert str(adapter) in str(caught.value)


INTRICATE = ["(.*)*x", "((a?)+)+x", ".?" * 40 + "x", "(l|l|a)(a|a|y|)" * 12, ".*.*.*.*.*x", "([a-z]|.)*x"]


@pytest.mark.parametrize("pattern", ["(q", "a{99999999999}", *INTRICATE])
def test_patterns_that_would_take_for_ever(adapter, pattern):
    change_json(adapter / "adapter_config.json", rank_pattern={pattern: 4})
    said = "is too complex: name the layers" if pattern in INTRICATE else "is not a pattern of layers"
    with pytest.raises(UserError, match=f"{re.escape(pattern)} {said}"):
        load_adapter(ours(hf_folder("gqa")), adapter)


@pytest.mark.parametrize(
    "pattern",
    [
        r"model.layers.1.self_attn.q_proj",
        r".*layers\.\d+\..*q_proj",
        r"layers\.(0|1|2)\.(self_attn\.)?q_proj",
        "q_proj",
    ],
)
def test_patterns_of_layers(pattern):
    assert [by_pattern({pattern: 4}, f"model.layers.1.self_attn.{name}_proj", 16) for name in "qv"] == [4, 16]


def test_an_adapter_of_the_head_that_came_with_other_weights(tmp_path, refused):
    peft_adapter(theirs("gqa"), tmp_path / "adapter", "with_head")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    content = load_file(file)
    (copied,) = [name for name in content if name.endswith("lm_head.base_layer.weight")]
    content[copied][0, 0] += 1
    save_file(content, file)
    message = refused(hf_folder("gqa"), "to=hf", f"adapter={tmp_path / 'adapter'}")
    assert "also holds output.weight, which differs from the checkpoint's" in message


# What the user types


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "model=from_checkpoint takes its sizes from a checkpoint: give checkpoint=DIR"),
        ("model=tiny output=x", "give to=hf, to=meta or to=gguf"),
        ("model=tiny to=hf", "give output=DIR"),
        ("model=tiny to=onnx output=x", "to=onnx is not allowed: it must be one of hf, meta, gguf"),
        ("model=tiny to=hf output=x shards=0", "shards=0 is not allowed: it must be between 1 and 1000"),
        ("model=tiny to=hf output=x checkpoint=random", "checkpoint=random has no weights to convert"),
        ("model=llama2_7b to=hf output=x", "give checkpoint=DIR"),
        ("checkpoint=random to=hf output=x", "takes its sizes from a checkpoint"),
        ("model=tiny to=hf output=x dtype=int8", "dtype=int8 is not allowed"),
        ("model=tiny to=hf output=x adapter=nowhere", "adapter=nowhere: there is no such folder"),
        ("model=tiny to=hf output=x tokenizer=nowhere", "tokenizer=nowhere: there is no such file"),
    ],
)
def test_the_likeliest_mistakes(tmp_path, monkeypatch, converted, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, HydraException)) as caught:
        converted(*arguments.split())
    explained = cli.explain(caught.value, ConvertConfig)
    assert message in explained
    assert explained.count(message.rpartition(": ")[2]) == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, monkeypatch, converted):
    for name in ("file", "folder/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match="exists already and is not overwritten"):
            converted("model=tiny", "to=hf", f"output={tmp_path / name.split('/')[0]}")
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(UserError, match=r"output=.*/file/deeper cannot be written: "):
        converted("model=tiny", "to=hf", f"output={tmp_path / 'file' / 'deeper'}")
    (tmp_path / "empty").mkdir()
    for name, target in (("to_empty", "empty"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(UserError, match="exists already and is not overwritten"):
            converted("model=tiny", "to=hf", f"output={tmp_path / name}")
        (tmp_path / name).unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder"]
    monkeypatch.chdir(tmp_path / "empty")  # the folder that one stands in
    assert " in .\n" in converted("model=tiny", "to=hf", "output=.")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_tokenizers_are_known_by_what_is_in_them(tmp_path, converted):
    file = tmp_path / "any.json"
    shutil.copy(CHECKOUT / "llama_ft" / "model" / "tiny" / "tokenizer.model", file)
    converted("model=tiny", "to=meta", f"output={tmp_path / 'out'}", f"tokenizer={file}")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_disk_that_gets_full(tmp_path, monkeypatch, converted, to):
    as_bytes, pieces = writing.as_bytes, 0

    def full(rows: Tensor) -> memoryview:
        nonlocal pieces
        pieces += 1
        if pieces > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return as_bytes(rows)

    for module in ("writing", "export"):
        monkeypatch.setattr(f"llama_ft.model.{module}.as_bytes", full)
    with pytest.raises(UserError, match=r"output=.*out cannot be written: No space left on device"):
        converted("model=tiny", f"to={to}", f"output={tmp_path / 'out'}")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match=r"7 MiB are needed, and 1 MiB are free there"):
        converted("model=tiny", f"to={to}", f"output={tmp_path / 'out'}")


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


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(tmp_path, number):
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, "model=tiny", "to=hf", f"output={tmp_path / 'out'}"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []


PEAKS = """
import shlex, sys
from pathlib import Path
from llama_ft import convert
for arguments in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    sys.argv = ["convert", *shlex.split(arguments)]
    convert.main()
    lines = Path("/proc/self/status").read_text().splitlines()
    print("peak", 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_than_pieces_is_in_memory(tmp_path):
    """Three tenths of the model, at most, beside what the process needs for a small one; benchmarks/ has 2 GiB."""
    config = ModelConfig("large", dim=1024, n_layers=4, n_heads=8, n_kv_heads=8, ffn_dim=2816, vocab_size=6000)
    (tmp_path / "own").mkdir()
    file = tmp_path / "own" / "model.safetensors"
    save_tensors({name: torch.ones(p.shape) for name, p in build(config).named_parameters()}, file, config)
    n_bytes = file.stat().st_size
    conversions = [
        "model=tiny to=meta output=tiny shards=2",
        "checkpoint=own to=meta output=meta shards=4",
        "checkpoint=meta to=hf output=hf shards=2",
    ]
    child = subprocess.run(
        [sys.executable, "-c", PEAKS, *conversions], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    small, *peaks = (int(peak) for peak in re.findall(r"^peak (\d+)$", child.stdout, re.MULTILINE))
    assert len(peaks) == 2
    assert n_bytes > 240e6
    assert max(peaks) - small < 0.3 * n_bytes
    assert all((tensor == 1).all() for tensor in tensors(tmp_path / "hf").values())
    for name in ("own", "meta", "hf"):
        shutil.rmtree(tmp_path / name)  # pytest would keep them


@pytest.mark.process
def test_the_command_says_what_it_does(tmp_path):
    done = run("llama_ft.convert", "model=tiny", "to=meta", "output=meta", "shards=2", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "Written: consolidated.00.pth, consolidated.01.pth, params.json, tokenizer.model in meta\n"
    assert re.fullmatch(
        r"llama_ft to Meta: 7 MiB from .*\nMeta's format does not store the context of 1,024.*\n", done.stderr
    )
