"""`python -m llama_ft.generate`: the answers of transformers' generate, adapters, and what is refused."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run
from test_kv_cache import make_model
from test_model import reference

from llama_ft.config import DecodingConfig, ModelConfig, ModelSource, UserError
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import generate
from llama_ft.model.transformer import Transformer
from llama_ft.techniques.adapter import load_adapter
from llama_ft.techniques.lora import add_lora
from llama_ft.training.saver import save_trained

PROMPTS = ("Hello", "What is the plural of fox?", "Two and two are")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ModelSource(model=SMALL).tokenizer_file)


# Named tiny, so that its tokenizer is the built-in one.
SMALL = ModelConfig("tiny", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=2048, context=128)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model(SMALL)


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("n_beams", [1, 4])
def test_answers_are_those_of_transformers(
    model: Transformer, tokenizer: Tokenizer, prompt: str, n_beams: int, kv_cache: bool
) -> None:
    config = DecodingConfig(max_new_tokens=20, n_beams=n_beams)
    ((answer,),) = generate(model, tokenizer, [prompt], config, kv_cache)
    tokens = torch.tensor([tokenizer.encode(prompt, bos=True)])
    hf = reference(model)
    theirs = hf.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=20,
        num_beams=n_beams,
        do_sample=False,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=0,
    )[0]
    assert answer.text == tokenizer.decode(theirs.tolist()).removeprefix(tokenizer.decode(tokens[0].tolist()))


def test_samples_repeat_with_their_seed_and_differ_without(model: Transformer, tokenizer: Tokenizer) -> None:
    config = DecodingConfig(sample=True, top_p=0.9, max_new_tokens=12, num_return_sequences=3)
    (first,), (again,) = (generate(model, tokenizer, ["Hello"], config, kv_cache) for kv_cache in (True, False))
    assert first == again
    assert len({answer.text for answer in first}) == 3
    assert generate(model, tokenizer, ["Hello"], replace(config, seed=1)) != [first]


def test_text_comes_piece_by_piece_and_ends_before_a_stop_string(model: Transformer, tokenizer: Tokenizer) -> None:
    pieces: list[str] = []
    ((whole,),) = generate(model, tokenizer, ["Hello"], DecodingConfig(max_new_tokens=30), on_text=pieces.append)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 5
    assert (whole.n_tokens, whole.finish) == (30, "length")
    stop = whole.text[10:14]
    ((stopped,),) = generate(model, tokenizer, ["Hello"], DecodingConfig(max_new_tokens=30, stop=[stop]))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish == "stop"


def test_an_answer_ends_where_the_context_does(model: Transformer, tokenizer: Tokenizer) -> None:
    n_prompt = len(tokenizer.encode("Hello", bos=True))
    ((answer,),) = generate(model, tokenizer, ["Hello"], DecodingConfig(max_new_tokens=1000))
    assert answer.n_tokens == SMALL.context - n_prompt or answer.finish == "eos"
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, and the model's context is 128"):
        generate(model, tokenizer, ["Hello " * 200], DecodingConfig())


# Adapters


def trained_adapter(folder: Path, rank: int = 4) -> Path:
    """What a run with LoRA leaves, with an adapter that changes much."""
    folder.mkdir()
    adapted = make_model(SMALL)
    add_lora(adapted, rank, 8.0, 0.0, ["wq", "w2"])
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    save_trained(adapted, folder)
    lora = f"lora: {{rank: {rank}, alpha: 8.0, dropout: 0.1, targets: [wq, w2]}}\n"
    (folder / "config.yaml").write_text(lora)
    return folder


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_changes_the_logits_as_it_did_in_training(tmp_path: Path, merge: bool) -> None:
    folder, tokens = trained_adapter(tmp_path / "run"), torch.arange(1, 30)[None]
    adapted, plain = make_model(SMALL), make_model(SMALL)
    load_adapter(adapted, folder, merge)
    torch.manual_seed(3)
    expected = make_model(SMALL)
    with torch.no_grad():
        a = {n: p for n, p in adapted.named_parameters() if "lora" in n}
        for name, linear in expected.named_modules():
            if name.endswith(("wq", "w2")):
                linear.weight += 8.0 / 4 * a[f"{name}.lora_B"] @ a[f"{name}.lora_A"]
        assert (adapted(tokens) - expected(tokens)).abs().max() <= 1e-4 * expected(tokens).abs().max()
        assert (adapted(tokens) - plain(tokens)).abs().max() > 0.1


def test_what_is_no_adapter_of_this_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no adapter\.safetensors in it"):
        load_adapter(make_model(SMALL), tmp_path, True)
    folder = trained_adapter(tmp_path / "run")
    with pytest.raises(UserError, match=r"does not fit model=tiny: model.dim is 32 and there 64"):
        load_adapter(make_model(replace(SMALL, dim=32)), folder, True)
    (folder / "config.yaml").write_text("lora: {rank: 2, alpha: 8.0, dropout: 0.1, targets: [wq, w2]}\n")
    with pytest.raises(UserError, match="does not hold the tensors"):
        load_adapter(make_model(SMALL), folder, True)
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match="lacks how it was made"):
        load_adapter(make_model(SMALL), folder, True)


# The command


def command(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("llama_ft.generate", *arguments, cwd=cwd)


def test_standard_output_is_the_text_alone_and_the_same_without_a_cache(tmp_path: Path) -> None:
    outputs = []
    for kv_cache in ("true", "false"):
        done = command(tmp_path, "prompt=Hello", "decoding.max_new_tokens=8", f"kv_cache={kv_cache}")
        assert done.returncode == 0, done.stderr
        assert "8 tokens in" in done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] != ""
    assert list(tmp_path.iterdir()) == []


WRONG = {
    (): 'give either prompt="…" or instruction="…"',
    ("prompt=a", "instruction=b"): 'give either prompt="…" or instruction="…"',
    ('prompt=""',): "is not allowed: it must be a text",
    ("prompt=a", "input=b"): "input belongs to an instruction",
    ("prompt=a", "decoding=best"): "one of beam, greedy, temperature, top_k, top_p",
    ("prompt=a", "decoding.top_p=0"): "decoding.top_p=0",
    ("prompt=a", "decoding.num_return_sequences=2"): "at most decoding.n_beams unless decoding.sample=true",
    ("prompt=a", "decoding=beam", "decoding.sample=true"): "decoding.n_beams above 1",
    ("prompt=a", "model=llama2_7b"): "has no built-in weights",
    ("prompt=a", "adapter=nowhere"): "there is no adapter.safetensors in it",
    ("prompt=a", "decoding.beams=2"): "decoding.beams is not a key: decoding has sample",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = command(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert WRONG[arguments] in line
