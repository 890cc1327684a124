"""`generate prompts=FILE`: batches, what is read and refused, and results that go on where they stop."""

import fcntl
import json
import re
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.models import SMALL, make_model, trained_adapter

from llama_ft.config import DecodingConfig, GenerateConfig, ModelSource, UserError
from llama_ft.data.prompt import prompt_text
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import GenerateFn, generate
from llama_ft.decoding.prompt_file import answer_keys, answer_prompts, settings_hash
from llama_ft.decoding.prompts import Prompt, prompt_of, read_prompts
from llama_ft.model.transformer import Transformer
from llama_ft.records.answers import Answer
from llama_ft.system import no_progress, silent
from llama_ft.techniques.adapter import load_adapter

TEXTS = ["Hello", "What is the plural of fox? " * 3, "Two", "One and two and three are"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ModelSource(model=SMALL, checkpoint="random").tokenizer_file)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model(SMALL)


# Batches

WAYS = {
    "greedy": DecodingConfig(max_new_tokens=16),
    "penalty": DecodingConfig(max_new_tokens=16, repetition_penalty=1.5),
    "sampling": DecodingConfig(max_new_tokens=16, sample=True, top_p=0.9, num_return_sequences=3, seed=5),
    "beam": DecodingConfig(max_new_tokens=8, n_beams=3, num_return_sequences=2),
}


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_has_the_answers_of_each_prompt_alone(model, tokenizer, way, kv_cache):
    together = generate(model, tokenizer, TEXTS, WAYS[way], kv_cache)
    assert together == [generate(model, tokenizer, [text], WAYS[way], kv_cache)[0] for text in TEXTS]
    texts = [answer.text for answers in together for answer in answers]
    assert len(set(texts)) == len(texts) == len(TEXTS) * WAYS[way].num_return_sequences


def test_stop_strings_end_each_answer_of_a_batch_by_itself(model, tokenizer):
    whole = [answers[0].text for answers in generate(model, tokenizer, TEXTS, WAYS["greedy"])]
    stop = whole[0][3:6]
    found = generate(model, tokenizer, TEXTS, replace(WAYS["greedy"], stop=[stop]))
    assert [answers[0].text for answers in found] == [text.partition(stop)[0] for text in whole]
    assert {answers[0].finish for answers in found} == {"stop", "length"}


@pytest.mark.parametrize("kv_cache", [True, False])
def test_each_answer_of_a_batch_ends_where_its_own_context_does(tokenizer, kv_cache):
    model = make_model(replace(SMALL, max_seq_len=40))
    long = "Hello " * 60
    while len(tokenizer.encode(long, bos=True)) > 37:
        long = long[:-1]
    prompts, config = ["Hello", long, "Two and two"], DecodingConfig(max_new_tokens=1000)
    together = generate(model, tokenizer, prompts, config, kv_cache)
    rooms = [40 - len(tokenizer.encode(prompt, bos=True)) for prompt in prompts]
    assert rooms[1] == 3
    assert [answer.n_tokens for (answer,) in together] == rooms
    assert together == [generate(model, tokenizer, [prompt], config, kv_cache)[0] for prompt in prompts]


# Reading


def write_lines(file: Path, *records: Any) -> Path:
    file.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return file


RECORDS: list[dict[str, Any]] = [
    {"prompt": "Hello", "id": 7, "answers": ["of the record"]},
    {"instruction": "Sum up.", "input": "One and one.", "output": "2", "task": "ü\u2028", "score": 0.1},
    {"instruction": "Go on.", "input": None},
    {"prompt": " ", "instruction": None, "nested": {"a": [1, None]}},
]


def test_a_file_is_read_as_json_and_as_jsonl(tmp_path, tokenizer):
    expected = ["Hello", prompt_text("Sum up.", "One and one."), prompt_text("Go on."), " "]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(RECORDS, indent=1))
    for file in (array, write_lines(tmp_path / "lines.jsonl", *RECORDS)):
        prompts = read_prompts(file, ["answer"], tokenizer, 128)
        assert [prompt.text for prompt in prompts] == expected
        assert [prompt.record for prompt in prompts] == RECORDS
    one = tmp_path / "one.json"
    one.write_text(json.dumps(RECORDS[0], indent=1))
    assert read_prompts(one, [], tokenizer, 128) == [Prompt("Hello", RECORDS[0], "alpaca")]


BAD: dict[str, tuple[Any, str]] = {
    "neither": ({"output": "a"}, "it must have either prompt or instruction"),
    "both": ({"prompt": "a", "instruction": "b"}, "it must have either prompt or instruction, not both"),
    "empty prompt": ({"prompt": ""}, "prompt is empty"),
    "empty instruction": ({"instruction": " \n"}, "instruction is empty"),
    "number": ({"prompt": 3}, "prompt must be a text"),
    "input": ({"prompt": "a", "input": "b"}, "input belongs to an instruction"),
    "array": ([], "a record must be an object such as"),
    "json": ("{\n", "not valid JSON"),
    "taken": ({"prompt": "a", "answer": "b"}, "the key answer is reserved for the answer"),
    "long": ({"prompt": "Hello " * 200}, "tokens, but the model's context is 128"),
    "kept surrogate": ('{"prompt": "a", "kept": "\\ud800"}\n', "surrogates not allowed"),
    "kept infinity": ('{"prompt": "a", "kept": Infinity}\n', "not JSON compliant"),
    "surrogate": ('{"prompt": "\\ud800"}\n', "prompt is not text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_number_and_line(tmp_path, tokenizer, name):
    record, problem = BAD[name]
    file = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, "\n", record, {"prompt": "b"})
    with pytest.raises(UserError) as refused:
        read_prompts(file, ["answer", "finish"], tokenizer, 128)
    assert str(refused.value).startswith(f"prompts={file}: record 1 (line 3): ")
    assert problem in str(refused.value)


def test_all_bad_records_are_named_up_to_ten(tmp_path, tokenizer):
    file = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, *[{"prompt": ""}] * 12)
    with pytest.raises(UserError) as refused:
        read_prompts(file, [], tokenizer, 128)
    named = re.findall(r"record (\d+) \(line \d+\): prompt is empty", str(refused.value))
    assert named == [str(n) for n in range(1, 11)]
    assert str(refused.value).endswith("; and 2 more")


@pytest.mark.parametrize("content", ["", "[]", '{"name": "x"}', "[{]", "\ud800"])
def test_a_file_without_records_is_refused(tmp_path, tokenizer, content):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"p\.jsonl"):
        read_prompts(file, [], tokenizer, 128)


# Answers


class Counting:
    """Answers that tell which model was asked what, and whether it is the n-th prompt at which something happens."""

    def __init__(self, n_answers: int = 1, fail_at: int | None = None, error: type[BaseException] = UserError) -> None:
        self.loaded: list[bool] = []
        self.batches: list[list[str]] = []
        self.n_answers, self.fail_at, self.error = n_answers, fail_at, error

    def load(self, is_base: bool) -> GenerateFn:
        self.loaded.append(is_base)

        def answer(prompts: Sequence[str], on_text: Callable[[str], None]) -> list[list[Answer]]:
            if self.fail_at is not None and sum(map(len, self.batches)) + len(prompts) > self.fail_at:
                raise self.error("here")
            self.batches.append(list(prompts))
            who = "base" if is_base else "model"
            return [[Answer(f"{who} {n} to {p}\n\u2028ü", n, "eos") for n in range(self.n_answers)] for p in prompts]

        return answer


def settings(tmp_path: Path, **changes: Any) -> GenerateConfig:
    values = {"model": SMALL, "checkpoint": "random", "batch_size": 2, "prompts": "p"}
    return GenerateConfig(**(values | {"output": str(tmp_path / "a.jsonl")} | changes))


def prompts_of(records: list[dict[str, Any]] = RECORDS) -> list[Prompt]:
    return [Prompt(prompt_of(record), record) for record in records]


def answered(
    config: GenerateConfig, asked: Counting, records: list[dict[str, Any]] = RECORDS, dtype: str = "float32"
) -> list[str]:
    """What is logged of answering the records' prompts."""
    logged: list[str] = []
    answer_prompts(config, prompts_of(records), dtype, asked.load, no_progress, logged.append)
    return logged


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().decode().split("\n")[:-1]]


def test_lines_are_the_records_with_their_answers_in_their_order(tmp_path):
    asked, config = Counting(), settings(tmp_path, batch_size=3)
    logged = answered(config, asked)
    texts = [prompt_of(record) for record in RECORDS]
    added = {"finish": "eos", "n_tokens": 0, "settings_hash": settings_hash(config, "float32", prompts_of())}
    assert lines_of(tmp_path / "a.jsonl") == [
        record | {"answer": f"model 0 to {text}\n\u2028ü"} | added for record, text in zip(RECORDS, texts, strict=True)
    ]
    assert asked.batches == [texts[:3], texts[3:]]
    assert logged == [f"4 of 4 prompts are answered in {tmp_path / 'a.jsonl'}"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_several_answers_are_lists(tmp_path):
    decoding = DecodingConfig(sample=True, num_return_sequences=2)
    config = settings(tmp_path, decoding=decoding, compare=True, base="random")
    answered(config, Counting(n_answers=2), RECORDS[1:2])
    prompt = prompt_of(RECORDS[1])
    (line,) = lines_of(tmp_path / "a.jsonl")
    assert line == RECORDS[1] | {
        "answers": [f"model 0 to {prompt}\n\u2028ü", f"model 1 to {prompt}\n\u2028ü"],
        "base_answers": [f"base 0 to {prompt}\n\u2028ü", f"base 1 to {prompt}\n\u2028ü"],
        "finish": ["eos", "eos"],
        "n_tokens": [0, 1],
        "settings_hash": settings_hash(config, "float32", prompts_of(RECORDS[1:2])),
    }
    assert line.keys() - RECORDS[1].keys() == answer_keys(config)


def test_without_a_file_lines_are_printed_as_they_come(tmp_path, capsys):
    answered(settings(tmp_path, compare=True, base="random"), Counting())
    answered(settings(tmp_path, compare=True, base="random", output=None), Counting())
    printed = capsys.readouterr().out
    assert printed.encode() == (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(UserError, match="here"):
        answered(settings(tmp_path, output=None), Counting(fail_at=3))
    assert capsys.readouterr().out.count("\n") == 2


# Going on


@pytest.mark.parametrize("compare", [False, True])
def test_a_file_cut_anywhere_goes_on_to_the_same_bytes(tmp_path, compare):
    config = settings(tmp_path, compare=compare, base="random" if compare else None)
    file = tmp_path / "a.jsonl"
    answered(config, Counting())
    whole = file.read_bytes()
    ends = [index for index, byte in enumerate(whole, start=1) if byte == ord("\n")]
    for cut in [0, 1, *(end + shift for end in ends[:-1] for shift in (-1, 0, 1)), len(whole) - 1, len(whole)]:
        file.write_bytes(whole[:cut])
        asked = Counting()
        answered(replace(config, batch_size=3), asked)
        assert file.read_bytes() == whole
        n_missing = len(RECORDS) - sum(end <= cut for end in ends)
        assert sum(map(len, asked.batches)) == n_missing + (len(RECORDS) if compare and n_missing else 0)
        assert asked.loaded == ([True, False] if compare else [False]) * (n_missing > 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_an_interrupted_comparison_goes_on_in_either_half(tmp_path, error):
    config = settings(tmp_path, compare=True, base="random")
    answered(replace(config, output=str(tmp_path / "whole.jsonl")), Counting())
    first, second, third = (Counting(fail_at=n, error=error) for n in (2, 4, 9))
    for asked in (first, second):
        with pytest.raises(error, match="here"):
            answered(config, asked)
    answered(config, third)
    assert (first.loaded, second.loaded, third.loaded) == ([True], [True, False], [False])
    assert [sum(map(len, asked.batches)) for asked in (first, second, third)] == [2, 4, 2]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl", "whole.jsonl"}


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    for fail in (Counting(fail_at=0), Counting(fail_at=0, error=KeyboardInterrupt)):
        with pytest.raises(fail.error):
            answered(settings(tmp_path, compare=True, base="random"), fail)
        assert list(tmp_path.iterdir()) == []
    answered(settings(tmp_path, output=str(tmp_path / "new" / "folder" / "a.jsonl")), Counting())
    assert len(lines_of(tmp_path / "new" / "folder" / "a.jsonl")) == 4


def doubled(file: Path) -> None:
    file.write_bytes(file.read_bytes() * 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoding": DecodingConfig(repetition_penalty=1.5)},
        {"decoding": DecodingConfig(seed=2)},
        {"model": replace(SMALL, n_layers=3)},
        {"compare": True, "base": "random"},
        {"dtype": "bfloat16"},
        {"records": RECORDS[:2]},
        {"records": RECORDS[::-1]},
        {"records": [*RECORDS, {"prompt": "More"}]},
        {"damage": lambda file: file.write_text("hello\n")},
        {"damage": lambda file: file.write_text('{"answer": "of other software"}\n')},
        {"damage": doubled},
        {"damage": lambda file: file.write_text("no line ends here")},
        {
            "damage": lambda file: file.write_text(json.dumps(RECORDS))
        },  # the prompts themselves, as json.dump leaves them
        {"records": RECORDS[:1], "damage": lambda file: file.write_text(json.dumps(RECORDS[0]))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_file_of_other_prompts_or_settings_is_refused_and_left_alone(tmp_path, changes):
    answered(settings(tmp_path), Counting())
    file, asked = tmp_path / "a.jsonl", Counting()
    config_changes = {key: changes[key] for key in changes.keys() - {"records", "dtype", "damage"}}
    others = {key: changes[key] for key in changes.keys() & {"records", "dtype"}}
    changes.get("damage", silent)(file)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"a\.jsonl was made with other prompts or settings: name another output"):
        answered(settings(tmp_path, **config_changes), asked, **others)
    assert asked.loaded == []
    assert file.read_bytes() == before


def test_what_changes_no_answer_is_no_other_setting(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    shutil.copytree(trained_adapter(folders[0]), folders[1])
    config = settings(tmp_path, adapter=str(folders[0]))
    answered(config, Counting())
    moved = replace(config, adapter=str(folders[1]), batch_size=1, kv_cache=False, merge=False)
    assert answered(moved, Counting(fail_at=0)) == [f"4 of 4 prompts are answered in {config.output}"]
    (folders[1] / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="other prompts or settings"):
        answered(moved, Counting())


def test_a_file_that_another_process_writes_into_is_refused(tmp_path):
    with (tmp_path / "a.jsonl").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing into it"):
            answered(settings(tmp_path), Counting())
    answered(settings(tmp_path), Counting())  # a file that is empty can be taken


def test_a_full_disk_is_said_and_what_is_complete_stays(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    record = RECORDS[0] | {"long": "x" * 1500}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(UserError, match=r"output=.*a\.jsonl cannot be written: File too large"):
            answered(settings(tmp_path), Counting(), [record] * 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.jsonl").stat().st_size == 4000
    answered(settings(tmp_path), Counting(), [record] * 4)
    assert len(lines_of(tmp_path / "a.jsonl")) == 4


@pytest.mark.parametrize("place", ["folder", "file/a.jsonl", "/dev/null"])
def test_an_output_that_cannot_be_one_is_refused(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    asked = Counting()
    problem = "it must be a file|cannot be written: (Not a directory|File exists)"
    with pytest.raises(UserError, match=f"output=.*({problem})"):
        answered(settings(tmp_path, output=str(tmp_path / place)), asked)
    assert asked.loaded == []


# Two models


def test_a_comparison_has_the_answers_of_both_models(tmp_path, tokenizer):
    decoding = DecodingConfig(max_new_tokens=8)
    folder = trained_adapter(tmp_path / "run")
    tuned, plain = make_model(SMALL), make_model(SMALL)
    load_adapter(tuned, folder)
    models: dict[bool, Transformer] = {True: plain, False: tuned}

    def load(is_base: bool) -> GenerateFn:
        return lambda prompts, on_text: generate(models[is_base], tokenizer, prompts, decoding)

    config = settings(tmp_path, decoding=decoding, adapter=str(folder), compare=True)
    prompts = [Prompt(text, {"prompt": text}) for text in TEXTS]
    answer_prompts(config, prompts, "float32", load, no_progress, silent)
    for text, line in zip(TEXTS, lines_of(tmp_path / "a.jsonl"), strict=True):
        ((base,),), ((answer,),) = (generate(model, tokenizer, [text], decoding) for model in (plain, tuned))
        assert (line["base_answer"], line["answer"]) == (base.text, answer.text)
        assert (line["finish"], line["n_tokens"]) == (answer.finish, answer.n_tokens)
        assert base.text != answer.text
