"""`python -m llama_ft.generate`: the answers of transformers' generate, adapters, and what is refused."""

import copy
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import run
from helpers.models import SMALL, change_json, make_model, reference, trained_adapter

from llama_ft import cli
from llama_ft import generate as generate_command
from llama_ft.config import DecodingConfig, GenerateConfig, ModelSource, UserError
from llama_ft.data.prompt import prompt_text
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.chat import COMMANDS, chat, line_reader
from llama_ft.decoding.generate import GenerateFn, generate
from llama_ft.decoding.show import show_answers
from llama_ft.model.transformer import Transformer
from llama_ft.records.answers import Answer
from llama_ft.techniques.adapter import check_base_of
from llama_ft.techniques.lora import add_lora
from llama_ft.techniques.peft import read_adapter

PROMPTS = ("Hello", "What is the plural of fox?", "Two and two are")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ModelSource(model=SMALL).tokenizer_file)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model(SMALL)


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("n_beams", [1, 4])
def test_answers_are_those_of_transformers(model, tokenizer, prompt, n_beams, kv_cache):
    config = DecodingConfig(max_new_tokens=20, n_beams=n_beams)
    ((answer,),) = generate(model, tokenizer, [prompt], config, kv_cache)
    tokens = torch.tensor([tokenizer.encode(prompt, bos=True)])
    hf = reference(model)
    settings = {"max_new_tokens": 20, "num_beams": n_beams, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    theirs = hf.generate(tokens, attention_mask=mask, eos_token_id=tokenizer.eos_id, **settings)[0]
    assert answer.text == tokenizer.decode(theirs.tolist()).removeprefix(tokenizer.decode(tokens[0].tolist()))


@pytest.mark.parametrize("settings", [{}, {"n_beams": 3}, {"sample": True, "num_return_sequences": 2}])
def test_each_end_ends_an_answer_however_it_is_decoded(model, tokenizer, settings):
    """Of several prompts side by side, too; what comes before it is what came without it."""
    config = DecodingConfig(max_new_tokens=20, **settings)
    several = copy.copy(tokenizer)
    several.end_ids |= set(range(0, SMALL.vocab_size, 3))
    answers = [answer for answers in generate(model, several, PROMPTS, config) for answer in answers]
    assert [answer.finish for answer in answers] == ["eos"] * len(answers)
    assert len({answer.n_tokens for answer in answers}) > 1
    if "n_beams" not in settings:
        before = [answer for answers in generate(model, tokenizer, PROMPTS, config) for answer in answers]
        assert all(long.text.startswith(short.text) for long, short in zip(before, answers, strict=True))


def test_samples_repeat_with_their_seed_and_differ_without(model, tokenizer):
    config = DecodingConfig(sample=True, top_p=0.9, max_new_tokens=12, num_return_sequences=3)
    (first,), (again,) = (generate(model, tokenizer, ["Hello"], config, kv_cache) for kv_cache in (True, False))
    assert first == again
    assert len({answer.text for answer in first}) == 3
    assert generate(model, tokenizer, ["Hello"], replace(config, seed=1)) != [first]


def test_text_comes_piece_by_piece_and_ends_before_a_stop_string(model, tokenizer):
    pieces: list[str] = []
    ((whole,),) = generate(model, tokenizer, ["Hello"], DecodingConfig(max_new_tokens=30), on_text=pieces.append)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 5
    assert (whole.n_tokens, whole.finish) == (30, "length")
    stop = whole.text[10:14]
    ((stopped,),) = generate(model, tokenizer, ["Hello"], DecodingConfig(max_new_tokens=30, stop=[stop]))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish == "stop"


def test_an_answer_ends_where_the_context_does(model, tokenizer):
    n_prompt = len(tokenizer.encode("Hello", bos=True))
    ((answer,),) = generate(model, tokenizer, ["Hello"], DecodingConfig(max_new_tokens=1000))
    assert answer.n_tokens == SMALL.max_seq_len - n_prompt or answer.finish == "eos"
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, but the model's context is 128"):
        generate(model, tokenizer, ["Hello " * 200], DecodingConfig())


def test_generating_while_training_has_no_dropout(tokenizer):
    model = make_model(SMALL).train()
    add_lora(model, dropout=0.9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    config = DecodingConfig(max_new_tokens=12)
    while_training = generate(model, tokenizer, ["Hello"], config)
    assert all(module.training for module in model.modules())
    assert generate(model.eval(), tokenizer, ["Hello"], config) == while_training
    assert not model.training


# The dialogue


def dialogue(
    answer: Callable[[str], None],
    *lines: str | type[BaseException],
    use_adapter: Callable[[str], None] = lambda folder: pytest.fail(folder),
) -> list[str]:
    """What is said in it, without the greeting."""
    said: list[str] = []
    left = iter(lines)

    def read_line() -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    chat(answer, use_adapter, read_line, said.append)
    assert next(left, None) is None
    return said[1:]


def test_each_line_of_a_dialogue_is_an_instruction_by_itself():
    prompts: list[str] = []
    lines = ["Name a color.", "", "  ", "/input One and one.", " Sum up. ", "Again.", "/raw  Once "]
    assert dialogue(prompts.append, *lines, "Is /etc/x a path?") == []
    expected = [prompt_text("Name a color."), prompt_text("Sum up.", "One and one."), prompt_text("Again.")]
    assert prompts == [*expected, " Once ", prompt_text("Is /etc/x a path?")]


def test_errors_in_a_dialogue_are_a_line_and_it_goes_on():
    prompts: list[str] = []

    def answer(prompt: str) -> None:
        if "long" in prompt:
            raise UserError("the prompt is too long")
        prompts.append(prompt)

    said = dialogue(answer, "/raw long", "/raw", "/rew x", "\udcff", "/raw short")
    assert [line.count("\n") for line in said] == [0] * 4
    for line, part in zip(said, ("too long", "prompt is empty", "/rew is not a command", "not UTF-8"), strict=True):
        assert line.startswith("error: ")
        assert part in line
    assert prompts == ["short"]


def test_help_names_every_command():
    (said,) = dialogue(pytest.fail, "/help")
    assert set(re.findall(r"^/\w+", said, re.MULTILINE)) == {*(f"/{name}" for name in COMMANDS), "/quit"}


def test_a_dialogue_changes_adapters():
    done: list[str] = []

    def use(folder: str) -> None:
        if folder == "bad":
            raise UserError("there is no such folder")
        done.append(f"use {folder}")

    lines = ("/raw a", "/adapter some folder ", "/raw b", "/adapter bad", "/adapter", "/raw c")
    assert dialogue(done.append, *lines, use_adapter=use) == ["error: there is no such folder"]
    assert done == ["a", "use some folder", "b", "use ", "c"]


@pytest.mark.parametrize("end", ["/quit", EOFError, KeyboardInterrupt])
def test_a_dialogue_ends(end):
    assert dialogue(pytest.fail, end) == []


def test_ctrl_c_stops_an_answer_and_no_more():
    before, prompts = signal.getsignal(signal.SIGINT), []

    def answer(prompt: str) -> None:
        if prompt == "stop":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        prompts.append(prompt)

    assert dialogue(answer, "/raw stop", "/raw go on") == ["stopped"]
    assert prompts == ["go on"]
    assert signal.getsignal(signal.SIGINT) is before

    def terminated(prompt: str) -> None:
        raise KeyboardInterrupt  # what the command makes of SIGTERM

    with pytest.raises(KeyboardInterrupt):
        dialogue(terminated, "/raw a")


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [io.TextIOWrapper, Terminal])
def test_lines_are_read_from_pipes_and_terminals(monkeypatch, capsys, kind):
    monkeypatch.setattr(sys, "stdin", kind(io.BytesIO("one ü\n\xff\n\ntwo".encode("latin-1")), encoding="utf-8"))
    read_line = line_reader()
    assert [read_line() for _ in range(4)] == ["one \udcfc", "\udcff", "", "two"]
    with pytest.raises(EOFError):
        read_line()
    # Standard output has the answers alone.
    assert capsys.readouterr() == ("", "> > > > > \n" if kind is Terminal else "")


# What is printed


def asked(*answers: Answer) -> Callable[[bool], GenerateFn]:
    """Loads models that give these answers: the base with its name before them."""

    def load(is_base: bool) -> GenerateFn:
        def answer(prompts: Sequence[str], on_text: Callable[[str], None]) -> list[list[Answer]]:
            found = [replace(a, text=f"base {a.text}") if is_base else a for a in answers]
            for word in found[0].text.split(" "):
                on_text(f"{word} ")
            if found[0].finish == "error":
                raise UserError("broken off")
            return [found]

        return answer

    return load


def config_of(n_answers: int = 1, compare: bool = False) -> GenerateConfig:
    decoding = DecodingConfig(sample=True, num_return_sequences=n_answers)
    base = "random" if compare else None
    return GenerateConfig(model=SMALL, checkpoint="random", prompt="a", decoding=decoding, base=base, compare=compare)


def test_a_single_answer_is_streamed_and_its_line_ended(capsys):
    said: list[str] = []
    show_answers("a", asked(Answer("one two", 2, "eos")), config_of(), said.append)
    assert capsys.readouterr().out == "one two \n"
    assert said == [f"2 tokens in {said[0].split()[3]} s, with a KV cache; ended by eos"]
    with pytest.raises(UserError):
        show_answers("a", asked(Answer("one two", 2, "error")), config_of(), said.append)
    assert capsys.readouterr().out == "one two \n"


def test_several_answers_are_lines(capsys):
    said: list[str] = []
    answers = Answer("one", 1, "eos"), Answer("two", 3, "length")
    show_answers("a", asked(*answers), config_of(n_answers=2), said.append)
    assert capsys.readouterr().out == "one\ntwo\n"
    assert said[:2] == ["answer 1, ended by eos:", "answer 2, ended by length:"]
    assert said[2].startswith("4 tokens in")


def test_compared_answers_are_named(capsys, monkeypatch):
    said: list[str] = []
    answers = Answer("one [b]", 1, "eos"), Answer("two", 3, "length")
    show_answers("a", asked(*answers), config_of(n_answers=2, compare=True), said.append)
    printed = "base:\nbase one [b]\n\nfine-tuned:\none [b]\n\nbase:\nbase two\n\nfine-tuned:\ntwo\n"
    assert capsys.readouterr().out == printed
    assert [line.partition(" tokens")[0] for line in said] == ["base: 4", "fine-tuned: 4"]
    for name, value in {"TTY_COMPATIBLE": "1", "COLUMNS": "100", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    show_answers("a", asked(*answers), config_of(n_answers=2, compare=True), said.append)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "two" in line)
    assert re.findall(r"[│┃] (.*?) *[│┃] (.*?) *[│┃]", line) == [("base two", "two")]
    assert any("base one [b]" in line for line in lines)


# The command


@dataclass(frozen=True)
class Done:
    """What a command left."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Runs the command in this process, in an empty folder."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored at the end, as are the other things that a command changes
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> Done:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["generate", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run_command(generate_command.main, generate_command.USAGE)
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, printed.out, printed.err)

    yield call
    signal.signal(signal.SIGTERM, handler)


TINY = ("checkpoint=random", "model.n_layers=1", "gpu=cpu")


@pytest.mark.process
def test_standard_output_is_the_text_alone_and_the_same_without_a_cache(tmp_path, command):
    arguments = ("prompt=Hello", "decoding.max_new_tokens=8", *TINY)
    done = run("llama_ft.generate", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    uncached = command(*arguments, "kv_cache=false")
    assert done.stdout == uncached.out != ""
    for said, cached in ((done.stderr, "with"), (uncached.err, "without")):
        assert re.fullmatch(rf"device: .*\n8 tokens in [\d.]+ s, {cached} a KV cache; ended by length\n", said)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_prompts_is_answered_as_each_by_itself(tmp_path, command):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello"}\n{"instruction": "Two and two", "input": "are"}\n')
    wanted = ("decoding=top_p", "decoding.max_new_tokens=6", *TINY)
    done = command("prompts=p.jsonl", "output=a.jsonl", *wanted)
    assert (done.status, done.out) == (0, ""), done.err
    assert "2 of 2 prompts are answered in a.jsonl" in done.err
    content = (tmp_path / "a.jsonl").read_text()
    alone = [command(*asked, *wanted).out for asked in (["prompt=Hello"], ["instruction=Two and two", "input=are"])]
    assert [f"{json.loads(line)['answer']}\n" for line in content.splitlines()] == alone
    assert command("prompts=p.jsonl", *wanted).out == content
    refused = command("prompts=p.jsonl", "output=a.jsonl", *wanted, "decoding.seed=1")
    assert refused.status == 2
    assert "output=a.jsonl was made with other prompts or settings" in refused.err
    assert (tmp_path / "a.jsonl").read_text() == content


def test_a_dialogue_by_a_pipe(tmp_path, command, monkeypatch, tiny_config):
    trained_adapter(tmp_path / "run", replace(tiny_config.model, n_layers=1))
    lines = f"Two and two\n/raw {'x ' * 2000}\n/raw Hello\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    arguments = ("adapter=run", "compare=true", "decoding.max_new_tokens=5", *TINY)
    done = command("interactive=true", *arguments)
    assert done.status == 0, done.err
    singles = [command(asked, *arguments).out for asked in ("instruction=Two and two", "prompt=Hello")]
    assert done.out == "".join(singles)
    assert done.out.count("base:\n") == done.out.count("fine-tuned:\n") == 2
    assert len(re.findall(r"^error: the prompt has .* tokens, but the model's context is", done.err, re.MULTILINE)) == 1


def test_a_dialogue_has_each_adapters_answers(tmp_path, command, monkeypatch, tiny_config):
    arguments = ("decoding.max_new_tokens=8", *TINY)
    small = replace(tiny_config.model, n_layers=1)
    trained_adapter(tmp_path / "one", small, ("wq", "wv"), alpha=64.0)
    trained_adapter(tmp_path / "the other", small, ("w1", "output"), alpha=64.0)
    shutil.copytree(tmp_path / "one", tmp_path / "foreign")
    change_json(tmp_path / "foreign" / "adapter_config.json", base_model_name_or_path="builtin")
    one, other = "adapter=one", "adapter=the other"
    singles = {chosen: command("prompt=Hello", *chosen, *arguments).out for chosen in ((), (one,), (other,))}
    assert len(set(singles.values())) == 3
    hello, foreign = "/raw Hello\n", "/adapter foreign\n"
    lines = f"{hello}/adapter the other\n{hello}/adapter\n{hello}/adapter no\n{foreign}{foreign}/adapter one\n{hello}"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    done = command("interactive=true", one, *arguments)
    assert done.out == singles[one,] + singles[other,] + singles[()] + singles[one,]
    said = [line for line in done.err.splitlines() if "adapter" in line]
    expected = ["with the adapter in the other", "without an adapter", "error: adapter=no: there is no such folder"]
    others = "error: adapter=foreign was trained on checkpoint=builtin, but this is checkpoint=random: give"
    assert said == [*expected, *[f"{others} checkpoint=builtin"] * 2, "with the adapter in one"]


TELL_ONE = 'give one of prompt="…", instruction="…", prompts=FILE and interactive=true'
WRONG = {
    (): TELL_ONE,
    ("prompt=a", "instruction=b"): TELL_ONE,
    ("prompts=a", "interactive=true"): TELL_ONE,
    ('prompt=""',): "is not allowed: it must be a text",
    ('instruction=" "',): "instruction is empty",
    ("prompt=a", "input=b"): "input belongs to an instruction",
    ("prompt=a", "output=b"): "output is for the answers to prompts=FILE",
    ("prompts=p", "batch_size=0"): "batch_size=0",
    ("prompts=nowhere.jsonl",): "data file nowhere.jsonl cannot be read: No such file",
    ("prompt=a", "compare=true"): "compare=true needs two models: give adapter=DIR, or base=DIR",
    ("prompt=a", "base=random"): "base is only for comparisons: give compare=true too",
    ("prompt=a", "base=nowhere", "compare=true"): "base=nowhere: there is no such folder",
    ("prompt=a", "checkpoint=nowhere"): "checkpoint=nowhere: there is no such folder",
    ("prompt=a", "decoding=best"): "one of beam, greedy, temperature, top_k, top_p",
    ("prompt=a", "decoding.top_p=0"): "decoding.top_p=0",
    ("prompt=a", "decoding.num_return_sequences=2"): "at most decoding.n_beams unless decoding.sample=true",
    ("prompt=a", "decoding=beam", "decoding.sample=true"): "decoding.n_beams above 1",
    ("prompt=a", "checkpoint=null", "model=llama2_7b"): "has no built-in weights",
    ("prompt=a", "adapter=nowhere"): "adapter=nowhere: there is no such folder",
    ("prompt=a", "decoding.beams=2"): "did you mean decoding.n_beams? decoding has sample",
    ("prompt=a", "prompt_file=b"): "did you mean prompt? the config has model",
    (f"prompt='{'a ' * 2000}'",): "tokens, but the model's context is",
    (f"instruction='{'a ' * 2000}'", "checkpoint=nowhere"): "tokens, but the model's context is",
}


@pytest.mark.parametrize("arguments", WRONG, ids=lambda arguments: " ".join(arguments)[:60])
def test_what_is_wrong_is_said_in_a_line(tmp_path, command, arguments):
    done = command(*TINY, *arguments)
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert WRONG[arguments] in line
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_said(command, monkeypatch):
    monkeypatch.setattr(Transformer, "forward", lambda *_, **__: torch.empty(2**60))
    done = command("prompt=a", *TINY)
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch("device: .*\nerror: out of memory: a smaller .*\n", done.err)


@pytest.mark.parametrize(
    ("trained_on", "given", "is_refused"),
    [
        ("random", "builtin", True),
        ("random", "weights", True),
        ("weights", "random", True),
        ("random", "random", False),
        ("old/place", "new/place", False),
        ("builtin", "weights", False),  # a folder may hold what is built in, exported
        (None, "builtin", False),
    ],
)
def test_an_adapter_of_other_weights_is_refused(tmp_path, trained_on, given, is_refused):
    folder = trained_adapter(tmp_path / "run")
    change_json(folder / "adapter_config.json", base_model_name_or_path=trained_on)
    adapter = read_adapter(folder, SMALL)
    words = f"trained on checkpoint={trained_on}, but this is checkpoint={given}: give checkpoint={trained_on}"
    with pytest.raises(UserError, match=re.escape(words)) if is_refused else nullcontext():
        check_base_of(adapter, given)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": math.nan}, "decoding.temperature=nan is not allowed: it must be at least 1e-6 and finite"),
        ({"top_k": -1}, "decoding.top_k=-1"),
        ({"top_p": 1.01}, "decoding.top_p=1.01"),
        ({"repetition_penalty": 0.0}, "decoding.repetition_penalty=0.0"),
        ({"length_penalty": math.nan}, "decoding.length_penalty=nan"),
        ({"n_beams": 0}, "decoding.n_beams=0"),
        ({"num_return_sequences": 3, "n_beams": 2}, "decoding.num_return_sequences=3"),
        ({"max_new_tokens": 0}, "decoding.max_new_tokens=0"),
        ({"temperature": 5.0}, "decoding.temperature is for sampling"),
        ({"top_k": 3}, "decoding.top_k is for sampling"),
        ({"top_p": 0.5}, "decoding.top_p is for sampling"),
        ({"length_penalty": 2.0}, "decoding.length_penalty is for a beam search"),
        ({"early_stopping": True, "sample": True}, "decoding.early_stopping is for a beam search"),
        ({"n_beams": 10**9}, "decoding.n_beams=1000000000 is not allowed: it must be between 1 and 1024"),
        ({"sample": True, "num_return_sequences": 10**9}, "it must be between 1 and 1024"),
    ],
)
def test_options_that_would_do_nothing_or_too_much_are_refused(settings, words):
    with pytest.raises(UserError, match=re.escape(words)):
        DecodingConfig(**settings)


@pytest.mark.parametrize("typed", ["1e3", "true", "3.10", "1_000", "42"])
def test_a_text_that_looks_like_a_number_is_a_text(typed):
    assert cli.composed_config("generate", [f"prompt={typed}"], GenerateConfig).prompt == typed
