"""Models by name from the Hugging Face hub, played by a server on loopback."""

import errno
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import run
from helpers.checkpoints import peft_adapter, write_meta
from helpers.hub import Files, Hub, commit_id, served_hub
from huggingface_hub import constants, file_download
from transformers import LlamaConfig, LlamaForCausalLM

import llama_ft as lf
from llama_ft import cli, convert, evaluate, generate, hub, plan
from llama_ft.config import PACKAGE_DIR, SCHEMAS, UserError

NAME, NOBODY = "hub:org/small", "http://127.0.0.1:1"  # where no server is
TOKENIZER = PACKAGE_DIR / "model" / "tiny" / "tokenizer.model"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
SMALL = {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.model"}
# Of the same model in other formats, and what else lies in a repository: nobody needs it.
OTHERS = ("original/consolidated.00.pth", "original/params.json", "consolidated.safetensors", "pytorch_model.bin")


def files_in(folder: Path) -> Files:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def theirs(seed: int) -> LlamaForCausalLM:
    """transformers' model, tiny, with the built-in vocabulary."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, **sizes, **heads, initializer_range=0.1)).eval()


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return theirs(0)


@pytest.fixture(scope="module")
def files(reference: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A repository of it, in several files."""
    folder = tmp_path_factory.mktemp("small")
    reference.save_pretrained(folder, max_shard_size="200KB")
    shutil.copy(TOKENIZER, folder)
    found = files_in(folder)
    assert found.keys() == SMALL | {*SHARDS}
    return found | dict.fromkeys(OTHERS, b"not fetched") | {"README.md": b"# A model"}


@pytest.fixture
def server(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of this process, and of those that get `environment_of` it; the cache is empty."""
    for cached in (hub.fetch, hub.fetch_weights):
        cached.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    with served_hub() as served:
        served.repos["org/small"] = {"main": files}
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        yield served


def environment_of(server: Hub, cwd: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(cwd / "hf"), "WANDB_MODE": "offline"}


def folder_of(files: Files, repo: str = "org/small") -> Path:
    """Where a revision lies in the cache."""
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / commit_id(files)


def forget() -> None:
    """As a new process."""
    hub.fetch.cache_clear()
    hub.fetch_weights.cache_clear()


def composed(command: str, *arguments: str) -> Any:
    forget()
    return cli.composed_config(command, list(arguments), SCHEMAS[command])


def refusal(*arguments: str, command: str = "generate") -> str:
    """What is said, in one line, of what cannot be had."""
    with pytest.raises(UserError) as error:
        composed(command, "prompt=Hello", *arguments) if command == "generate" else composed(command, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is fetched


def test_only_what_is_read_is_fetched(server: Hub, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    config = composed("generate", "prompt=Hello", f"checkpoint={NAME}")
    folder = folder_of(files)
    assert config.checkpoint == str(folder)
    assert (config.model.name, config.model.dim, config.model.n_kv_heads) == ("small", 32, 2)
    assert config.tokenizer == str(folder / "tokenizer.model")
    assert sorted(server.names()) == sorted(SMALL | {*SHARDS})
    assert files_in(folder) == {name: files[name] for name in SMALL | {*SHARDS}}
    first, second = capsys.readouterr().err.splitlines()  # and no progress bar where there is no terminal
    assert first == f"checkpoint={NAME} is {folder} (revision {commit_id(files)[:7]})"
    assert second == f"checkpoint={NAME}: downloading 1 MiB ({', '.join(SHARDS)})"


def test_the_small_files_come_first_and_a_wrong_config_fetches_no_weights(server: Hub) -> None:
    assert "data.max_length=600 is not allowed" in refusal(f"checkpoint={NAME}", "data.max_length=600", command="train")
    assert {*server.names()} == SMALL


def test_a_second_time_costs_one_request(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):  # as rows of a sweep
        cli.composed_config("train", [f"checkpoint={NAME}", f"training.seed={number}"], SCHEMAS["train"])
    assert server.asked.count("GET /api/models/org/small/revision/main") == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
    server.asked.clear()
    composed("train", f"checkpoint={NAME}")
    assert server.asked == ["GET /api/models/org/small/revision/main"]
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.process
def test_a_plan_fetches_no_weights(server: Hub, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    arguments = [f"checkpoint={NAME}", "gpu=cpu", "optim=lora", "data.first=20", "output=plan"]
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    assert plan.main() == 0
    assert {*server.names()} == {*server.names("HEAD")} == SMALL
    assert "Written: " in capfd.readouterr().out


def test_a_revision_by_branch_tag_or_commit(server: Hub, files: Files) -> None:
    old = files | {"generation_config.json": b"{}"}
    server.repos["org/small"]["v1.0"] = old
    for name in ("v1.0", commit_id(old)):
        assert composed("generate", "prompt=a", f"checkpoint={NAME}@{name}").checkpoint == str(folder_of(old))
    assert composed("generate", "prompt=a", f"checkpoint={NAME}").checkpoint == str(folder_of(files))


def test_a_folder_of_another_model_says_its_sizes(server: Hub, files: Files, tmp_path: Path) -> None:
    """As on the hub, where no model is chosen; what has the default's sizes is the default."""
    folder = hub.local("checkpoint", NAME)
    assert composed("plan", f"checkpoint={folder}").model.dim == 32
    built_in = PACKAGE_DIR / "model" / "tiny"
    assert composed("plan", f"checkpoint={shutil.copytree(built_in, tmp_path / 'copy')}").model.name == "tiny"


def test_a_model_that_is_chosen_is_kept(server: Hub) -> None:
    assert composed("plan", f"checkpoint={NAME}", "model=llama2_7b").model.dim == 4096
    assert composed("plan", f"checkpoint={NAME}", "model.max_seq_len=64").model.max_seq_len == 64


def test_without_an_index_there_is_one_file(server: Hub, files: Files, reference: Any, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path / "one")
    one = files_in(tmp_path / "one") | {"consolidated.safetensors": b"not fetched"}
    server.repos["org/one"] = {"main": one | {"tokenizer.model": files["tokenizer.model"]}}
    composed("generate", "prompt=a", "checkpoint=hub:org/one")
    assert "model.safetensors" in server.names()
    assert "consolidated.safetensors" not in server.names()


def test_metas_format(server: Hub, files: Files, tmp_path: Path) -> None:
    """Its sizes are in the weights, which a plan does not fetch."""
    meta = files_in(write_meta("gqa", tmp_path / "meta")) | {"tokenizer.model": files["tokenizer.model"]}
    server.repos["org/meta"] = {"main": meta}
    assert "say the sizes" not in refusal("checkpoint=hub:org/meta", command="plan")
    assert not [name for name in server.names() if name.endswith(".pth")]
    assert composed("plan", "checkpoint=hub:org/meta", "model=llama2_7b").tokenizer
    assert composed("generate", "prompt=a", "checkpoint=hub:org/meta").model.n_kv_heads == 3
    assert "consolidated.00.pth" in server.names()


def test_a_gguf_file(server: Hub, files: Files) -> None:
    repo = {"a.Q4_0.gguf": b"GGUF", "sub/b.gguf": b"GGUF!"}
    server.repos["org/some-GGUF"] = {"main": repo}
    for name in repo:
        path = hub.fetch_weights("checkpoint", f"hub:org/some-GGUF/{name}@main")
        assert (path, path.read_bytes()) == (folder_of(repo, "org/some-GGUF") / name, repo[name])
    assert sorted(server.names()) == sorted(repo)
    problem = refusal("checkpoint=hub:org/some-GGUF")
    assert problem.endswith("params.json; give a GGUF file by its name: checkpoint=hub:org/some-GGUF/a.Q4_0.gguf")
    absent = "checkpoint=hub:org/some-GGUF/c.gguf"
    assert refusal(absent).startswith(f"{absent} does not exist, or is private: check the name at ")


def test_adapter_tokenizer_and_base(server: Hub, files: Files, reference: Any, tmp_path: Path) -> None:
    peft_adapter(theirs(0), tmp_path / "adapter", "default")
    server.repos |= {"org/lora": {"main": files_in(tmp_path / "adapter")}, "org/base": {"main": files}}
    config = composed("evaluate", f"checkpoint={NAME}", "adapter=hub:org/lora", "tokenizer=hub:org/base")
    assert files_in(Path(config.adapter)).keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert config.tokenizer == str(folder_of(files, "org/base") / "tokenizer.model")
    assert not (folder_of(files, "org/base") / SHARDS[0]).exists()
    composed("evaluate", f"checkpoint={NAME}", "base=hub:org/base")
    assert (folder_of(files, "org/base") / SHARDS[0]).exists()
    assert composed("train", f"checkpoint={NAME}", "optim=lora", "adapter=hub:org/lora").lora.rank == 16
    assert "it is a LoRA adapter: give adapter=hub:org/lora, and" in refusal("checkpoint=hub:org/lora")


# The commands, and the library


@pytest.mark.process
def test_training(server: Hub, tmp_path: Path) -> None:
    """In a process of its own, which knows the hub by its environment."""
    arguments = [f"checkpoint={NAME}", "optim=lora,mp_lora", "training.max_samples=4", "data.max_length=64"]
    more = ["tracker=disabled", "hydra.sweep.dir=sweep", "gpu=cpu"]
    done = run("llama_ft.train", "-m", *arguments, *more, cwd=tmp_path, env=environment_of(server, tmp_path))
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stderr.splitlines() if NAME in line]) == 2
    assert server.asked.count("GET /api/models/org/small/revision/main") == 1
    assert sorted(server.names()) == sorted(SMALL | {*SHARDS})
    for row in ("lora", "mp_lora"):
        result = json.loads((tmp_path / "sweep" / row / "result.json").read_text())
        assert (result["status"], result["model"]) == ("ok", "small")
        adapter = json.loads((tmp_path / "sweep" / row / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "org/small"  # for PEFT, on any machine


def test_generating_evaluating_and_converting(
    server: Hub, files: Files, reference: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(main: Any, *arguments: str) -> str:
        forget()
        monkeypatch.setattr(sys, "argv", ["", f"checkpoint={NAME}", *arguments])
        assert main() == 0
        return capsys.readouterr().out

    model, tokenizer = lf.load(NAME, device="cpu")
    prompt = tokenizer.encode("Once upon a time", bos=True)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        expected, ours = reference(tokens).logits, model(tokens)
        answer = reference.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_id)
    assert {hub.local("tokenizer", NAME), tokenizer.file} == {folder_of(files) / "tokenizer.model"}
    assert (ours - expected).abs().max() / expected.abs().max() <= 1e-5
    text = call(generate.main, "prompt=Once upon a time", "decoding.max_new_tokens=8", "gpu=cpu")
    assert tokenizer.decode(answer[0, len(prompt) :].tolist()).strip() in text

    call(evaluate.main, "data.first=4", "exact_match=false", "output=evaluation", "gpu=cpu")
    measured = json.loads(Path("evaluation/evaluate.json").read_text())
    assert math.isfinite(measured["models"][0]["responses"]["perplexity"])

    call(convert.main, "to=hf", "output=converted")
    again = LlamaForCausalLM.from_pretrained("converted")
    assert torch.equal(again(tokens).logits, expected)


# What goes wrong


@pytest.mark.parametrize("name", ["hub:", "hub:small", "hub:a/b/c", "hub:a/b@", "hub:a b/c", "hub:https://hf.co/a/b"])
def test_a_malformed_name(server: Hub, name: str) -> None:
    assert refusal(f"checkpoint={name}").startswith(f"checkpoint={name} is not allowed: it must be hub:ORG/NAME or hub")
    assert server.asked == []


def test_what_is_not_there(server: Hub) -> None:
    login = "log in with `hf auth login`, or set HF_TOKEN"
    where = f"{server.url}/org/other"
    expected = f"checkpoint=hub:org/other does not exist, or is private: check the name at {where}, or {login}"
    assert refusal("checkpoint=hub:org/other") == expected
    assert refusal(f"checkpoint={NAME}@v2").startswith(f"checkpoint={NAME}@v2 does not exist, or is private: ")
    hint = "there is no such folder; a name on the Hugging Face hub is hub:org/small"
    assert refusal("checkpoint=org/small", "model=from_checkpoint").endswith(hint)
    assert "org/s--mall was not fetched: Cannot have --" in refusal("checkpoint=hub:org/s--mall")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pytorch_model.bin", "; pytorch_model.bin is not read: convert it to safetensors"),
        ("flax_model.msgpack", ""),
    ],
)
def test_no_weights_that_are_read(server: Hub, files: Files, name: str, hint: str) -> None:
    small = {each: files[each] for each in ("config.json", "tokenizer.model")}
    server.repos["org/old"] = {"main": small | {name: b""}}
    problem = f"checkpoint=hub:org/old contains no weights that can be read{hint}"
    assert refusal("checkpoint=hub:org/old") == problem
    assert composed("plan", "checkpoint=hub:org/old").model.dim == 32
    server.repos["org/none"] = {"main": {"README.md": b""}}
    assert refusal("checkpoint=hub:org/none").endswith(" contains no config.json or params.json")


def test_a_gated_repository(server: Hub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gated, server.token = {"org/small"}, "hf_right"
    problem = f"is gated: accept its terms at {server.url}/org/small, then log in with `hf auth login`, or set HF_TOKEN"
    assert refusal(f"checkpoint={NAME}") == f"checkpoint={NAME} {problem}"
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert refusal(f"checkpoint={NAME}") == f"checkpoint={NAME} {problem}"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert composed("generate", "prompt=a", f"checkpoint={NAME}").checkpoint == str(folder_of(files))


def test_without_a_network(server: Hub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the cache is used, of a hub that is down, or away, or not to be asked."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    asked, cache = f"checkpoint={NAME}", f"incomplete in the cache, {constants.HF_HUB_CACHE}, and"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(server.url, NOBODY)
    for broken, reason in (
        ((server, "is_down", True), f"{server.url} cannot be reached (Server error '503 Service Unavailable'"),
        ((constants, "HUGGINGFACE_CO_URL_TEMPLATE", template), f"{NOBODY} cannot be reached (Connection refused)"),
        ((constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set: connect to fetch it"),
    ):
        with monkeypatch.context() as patched:
            if NOBODY in reason:
                patched.setattr(constants, "ENDPOINT", NOBODY)
            patched.setattr(*broken)
            nothing = refusal(asked, command="plan")
        composed("plan", asked)  # fetches the small files
        with monkeypatch.context() as patched:
            if NOBODY in reason:
                patched.setattr(constants, "ENDPOINT", NOBODY)
            patched.setattr(*broken)
            assert composed("plan", asked).checkpoint == str(folder_of(files))
            no_weights = refusal(asked)
        for problem in (nothing, no_weights):
            assert problem.startswith(f"checkpoint={NAME} is {cache} {reason}")
        shutil.rmtree(constants.HF_HUB_CACHE)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: Hub, files: Files, monkeypatch: Any) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.breaks = {SHARDS[1]: 1}
    composed("generate", "prompt=a", f"checkpoint={NAME}")
    size = len(files[SHARDS[1]])
    (start,) = [int(line.split("=")[1].rstrip("-")) for line in server.asked if " bytes=" in line]
    assert size // 2 - 1000 < start <= size // 2
    assert server.n_bytes[SHARDS[1]] == size // 2 + size - start


def test_half_a_download(server: Hub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command fetches what is missing, and no file that is whole again."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.breaks = {SHARDS[1]: 100}
    problem = refusal(f"checkpoint={NAME}")
    assert re.search(r" was not fetched: .+; the same command resumes the download$", problem)
    assert (folder_of(files) / SHARDS[0]).exists()
    assert not (folder_of(files) / SHARDS[1]).exists()
    server.breaks.clear()
    server.asked.clear()
    composed("generate", "prompt=a", f"checkpoint={NAME}")
    assert SHARDS[1] in server.names()
    assert SHARDS[0] not in server.names()


def test_a_file_of_another_size_is_refused(server: Hub, files: Files) -> None:
    server.shortened = {SHARDS[0]}
    size = len(files[SHARDS[0]])
    assert f"file should be of size {size} but has size {size - 1}" in refusal(f"checkpoint={NAME}")
    assert not (folder_of(files) / SHARDS[0]).exists()


def test_no_room(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    composed("plan", f"checkpoint={NAME}")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage)
        problem = refusal(f"checkpoint={NAME}")
    assert f"checkpoint={NAME}: 1 MiB are needed, and 0 MiB are free in " in problem

    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    expected = "cannot be stored in the cache, .*: No space left on device; HF_HOME=DIR names another place"
    assert re.search(expected, refusal(f"checkpoint={NAME}"))


def test_a_cache_that_cannot_be_written(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file where the folder should be")
    problem = refusal(f"checkpoint={NAME}")
    assert problem.startswith(f"checkpoint={NAME} cannot be stored in {tmp_path}/hf")
    assert problem.endswith("; HF_HOME=DIR names another place")


def test_the_package_is_not_installed(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    expected = f"checkpoint={NAME} needs the package huggingface_hub: pip install 'llama_ft[hub]'"
    assert refusal(f"checkpoint={NAME}") == expected
