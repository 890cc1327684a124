"""`generate prompts=FILE`: batches, what is read and refused, and results that go on where they stop."""

import fcntl
import json
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_generate import SMALL, trained_adapter
from test_kv_cache import make_model

from llama_ft.config import DecodingConfig, GenerateConfig, ModelSource, UserError
from llama_ft.data.prompt import prompt_text
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import Answer, GenerateFn, generate, ignore
from llama_ft.decoding.prompt_file import PromptFile, result_keys
from llama_ft.decoding.prompts import Prompt, prompt_of, read_prompts
from llama_ft.model.transformer import Transformer
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
def test_a_batch_has_the_answers_of_each_prompt_alone(
    model: Transformer, tokenizer: Tokenizer, way: str, kv_cache: bool
) -> None:
    together = generate(model, tokenizer, TEXTS, WAYS[way], kv_cache)
    assert together == [generate(model, tokenizer, [text], WAYS[way], kv_cache)[0] for text in TEXTS]
    texts = [answer.text for answers in together for answer in answers]
    assert len(set(texts)) == len(texts) == len(TEXTS) * WAYS[way].num_return_sequences


def test_stop_strings_end_each_answer_of_a_batch_by_itself(model: Transformer, tokenizer: Tokenizer) -> None:
    whole = [answers[0].text for answers in generate(model, tokenizer, TEXTS, WAYS["greedy"])]
    stop = whole[0][3:6]
    found = generate(model, tokenizer, TEXTS, replace(WAYS["greedy"], stop=[stop]))
    assert [answers[0].text for answers in found] == [text.partition(stop)[0] for text in whole]
    assert {answers[0].finish for answers in found} == {"stop", "length"}


@pytest.mark.parametrize("kv_cache", [True, False])
def test_each_answer_of_a_batch_ends_where_its_own_context_does(tokenizer: Tokenizer, kv_cache: bool) -> None:
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
    {"prompt": "Hello", "id": 7},
    {"instruction": "Sum up.", "input": "One and one.", "output": "2", "task": "ü\u2028", "score": 0.1},
    {"instruction": "Go on.", "input": None},
    {"prompt": " ", "instruction": None, "nested": {"a": [1, None]}},
]


def test_a_file_is_read_as_json_and_as_jsonl(tmp_path: Path, tokenizer: Tokenizer) -> None:
    expected = ["Hello", prompt_text("Sum up.", "One and one."), prompt_text("Go on."), " "]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(RECORDS, indent=1))
    for file in (array, write_lines(tmp_path / "lines.jsonl", *RECORDS)):
        prompts = read_prompts(file, ["answer"], tokenizer, 128)
        assert [prompt.text for prompt in prompts] == expected
        assert [prompt.record for prompt in prompts] == RECORDS
    one = tmp_path / "one.json"
    one.write_text(json.dumps(RECORDS[0], indent=1))
    assert read_prompts(one, [], tokenizer, 128) == [Prompt("Hello", RECORDS[0])]


BAD: dict[str, tuple[Any, str]] = {
    "neither": ({"output": "a"}, "either prompt or instruction must be there"),
    "both": ({"prompt": "a", "instruction": "b"}, "either prompt or instruction must be there, and not both"),
    "empty prompt": ({"prompt": ""}, "prompt is empty"),
    "empty instruction": ({"instruction": " \n"}, "instruction is empty"),
    "number": ({"prompt": 3}, "prompt must be a text"),
    "input": ({"prompt": "a", "input": "b"}, "input belongs to an instruction"),
    "array": ([], "a record must be an object with prompt or instruction, not list"),
    "json": ("{\n", "not valid JSON"),
    "taken": ({"prompt": "a", "answer": "b"}, "answer is what the answer will be under"),
    "long": ({"prompt": "Hello " * 200}, "tokens, and the model's context is 128"),
    "surrogate": ('{"prompt": "\\ud800"}\n', "prompt is not text"),
    "hidden surrogate": ('{"prompt": "a", "b": "\\ud800"}\n', "half of a surrogate pair"),
    "nan": ('{"prompt": "a", "b": NaN}\n', "no JSON: NaN"),
    "infinity": ('{"prompt": "a", "b": [1e999]}\n', "an infinity"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_number_and_line(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    record, problem = BAD[name]
    file = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, "\n", record, {"prompt": "b"})
    with pytest.raises(UserError) as refused:
        read_prompts(file, ["answer", "finish"], tokenizer, 128)
    assert str(refused.value).startswith(f"prompts={file}: record 1 (line 3): ")
    assert problem in str(refused.value)


def test_all_bad_records_are_named_up_to_ten(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, *[{"prompt": ""}] * 12)
    with pytest.raises(UserError) as refused:
        read_prompts(file, [], tokenizer, 128)
    assert [f"record {n} (line {n + 1}): prompt is empty" in str(refused.value) for n in (1, 10, 11)] == [
        True,
        True,
        False,
    ]
    assert str(refused.value).endswith("; and 2 more")


@pytest.mark.parametrize("content", ["", "[]", '{"name": "x"}', "[{]", "\ud800"])
def test_a_file_without_records_is_refused(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"p\.jsonl"):
        read_prompts(file, [], tokenizer, 128)


# Results


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield ignore


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
    values = {
        "model": SMALL,
        "checkpoint": "random",
        "batch_size": 2,
        "prompts": "p",
        "output": str(tmp_path / "a.jsonl"),
    }
    return GenerateConfig(**(values | changes))


def answer_file(
    config: GenerateConfig, asked: Counting, records: list[dict[str, Any]] = RECORDS, dtype: str = "float32"
) -> list[str]:
    """What is said of it."""
    said: list[str] = []
    prompts = [Prompt(prompt_of(record), record) for record in records]
    PromptFile(config, prompts, dtype, asked.load, no_progress, said.append).answer()
    return said


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().decode().split("\n")[:-1]]


def test_results_are_the_records_with_their_answers_in_their_order(tmp_path: Path) -> None:
    asked = Counting()
    said = answer_file(settings(tmp_path, batch_size=3), asked)
    texts = [prompt_of(record) for record in RECORDS]
    expected = [
        record | {"answer": f"model 0 to {text}\n\u2028ü", "finish": "eos", "n_tokens": 0}
        for record, text in zip(RECORDS, texts, strict=True)
    ]
    assert results(tmp_path / "a.jsonl") == expected
    assert asked.batches == [texts[:3], texts[3:]]
    assert said == [f"4 of 4 prompts are answered in {tmp_path / 'a.jsonl'}"]
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl", "a.jsonl.settings.json"}


def test_several_answers_are_lists(tmp_path: Path) -> None:
    decoding = DecodingConfig(sample=True, num_return_sequences=2)
    config = settings(tmp_path, decoding=decoding, compare=True, base="random")
    answer_file(config, Counting(n_answers=2), RECORDS[:1])
    (found,) = results(tmp_path / "a.jsonl")
    assert found == RECORDS[0] | {
        "answers": ["model 0 to Hello\n\u2028ü", "model 1 to Hello\n\u2028ü"],
        "base_answers": ["base 0 to Hello\n\u2028ü", "base 1 to Hello\n\u2028ü"],
        "finish": ["eos", "eos"],
        "n_tokens": [0, 1],
    }
    assert found.keys() - RECORDS[0].keys() == set(result_keys(config))


def test_without_a_file_results_are_printed_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer_file(settings(tmp_path, compare=True, base="random"), Counting())
    answer_file(settings(tmp_path, compare=True, base="random", output=None), Counting())
    printed = capsys.readouterr().out
    assert printed.encode() == (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(UserError, match="here"):
        answer_file(settings(tmp_path, output=None), Counting(fail_at=3))
    assert capsys.readouterr().out.count("\n") == 2


# Going on


@pytest.mark.parametrize("compare", [False, True])
def test_a_file_cut_anywhere_goes_on_to_the_same_bytes(tmp_path: Path, compare: bool) -> None:
    config = settings(tmp_path, compare=compare, base="random" if compare else None)
    file = tmp_path / "a.jsonl"
    answer_file(config, Counting())
    whole = file.read_bytes()
    ends = [index for index, byte in enumerate(whole, start=1) if byte == ord("\n")]
    for cut in [0, 1, *(end + shift for end in ends[:-1] for shift in (-1, 0, 1)), len(whole) - 1, len(whole)]:
        file.write_bytes(whole[:cut])
        asked = Counting()
        answer_file(replace(config, batch_size=3), asked)
        assert file.read_bytes() == whole
        n_missing = len(RECORDS) - sum(end <= cut for end in ends)
        assert sum(map(len, asked.batches)) == n_missing + (len(RECORDS) if compare and n_missing else 0)
        assert asked.loaded == ([True, False] if compare else [False]) * (n_missing > 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_an_interrupted_comparison_goes_on_in_either_half(tmp_path: Path, error: type[BaseException]) -> None:
    config = settings(tmp_path, compare=True, base="random")
    answer_file(replace(config, output=str(tmp_path / "whole.jsonl")), Counting())
    first, second, third = (Counting(fail_at=n, error=error) for n in (2, 4, 9))
    for asked in (first, second):
        with pytest.raises(error, match="here"):
            answer_file(config, asked)
    assert not (tmp_path / "a.jsonl").exists() or results(tmp_path / "a.jsonl")
    answer_file(config, third)
    assert (first.loaded, second.loaded, third.loaded) == ([True], [True, False], [False])
    assert [sum(map(len, asked.batches)) for asked in (first, second, third)] == [2, 4, 2]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"{name}.jsonl{end}" for name in ("a", "whole") for end in ("", ".settings.json")}


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    for fail in (Counting(fail_at=0), Counting(fail_at=0, error=KeyboardInterrupt)):
        with pytest.raises(fail.error):
            answer_file(settings(tmp_path, compare=True, base="random"), fail)
        assert list(tmp_path.iterdir()) == []
    answer_file(settings(tmp_path, output=str(tmp_path / "new" / "folder" / "a.jsonl")), Counting())
    assert len(results(tmp_path / "new" / "folder" / "a.jsonl")) == 4


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "decoding": (
        {"decoding": DecodingConfig(repetition_penalty=1.5, seed=2)},
        "decoding.repetition_penalty, decoding.seed",
    ),
    "model": ({"model": replace(SMALL, n_layers=3)}, "model.n_layers"),
    "compare": ({"compare": True, "base": "random"}, "base, compare"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_other_settings_is_refused_by_name(tmp_path: Path, name: str) -> None:
    changes, named = OTHERS[name]
    answer_file(settings(tmp_path), Counting())
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    asked = Counting()
    with pytest.raises(UserError, match=rf"a\.jsonl was made with other {named} \("):
        answer_file(settings(tmp_path, **changes), asked)
    assert asked.loaded == []
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_changes_no_answer_is_no_other_setting(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    shutil.copytree(trained_adapter(folders[0]), folders[1])
    config = settings(tmp_path, adapter=str(folders[0]))
    answer_file(config, Counting(), RECORDS)
    moved = replace(config, adapter=str(folders[1]), batch_size=1, kv_cache=False, merge=False)
    assert answer_file(moved, Counting(fail_at=0)) == [f"4 of 4 prompts are answered in {config.output}"]
    with pytest.raises(UserError, match="with other dtype"):
        answer_file(moved, Counting(), dtype="bfloat16")
    (folders[1] / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="with other adapter"):
        answer_file(moved, Counting())


FOREIGN = {
    "no settings": (lambda file: file.with_name("a.jsonl.settings.json").unlink(), "which tells what it is, does not"),
    "damaged settings": (lambda file: file.with_name("a.jsonl.settings.json").write_text("["), "tells what it is"),
    "a line of text": (lambda file: file.write_text("hello\n"), "something else than the result of prompt 1"),
    "a line too many": (lambda file: file.write_bytes(file.read_bytes() * 2), "result of prompt 5 in line 5"),
    "an edited line": (lambda file: file.write_bytes(file.read_bytes().replace(b'"id": 7', b'"id": 8')), "in line 1"),
    "a key too many": (lambda file: file.write_bytes(file.read_bytes().replace(b"}", b', "x": 1}', 1)), "in line 1"),
    "no JSON object": (lambda file: file.write_bytes(b"3\n"), "in line 1"),
    "zeros": (lambda file: file.write_bytes(bytes(9) + b"\n"), "in line 1"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    answer_file(settings(tmp_path), Counting())
    change, problem = FOREIGN[name]
    change(tmp_path / "a.jsonl")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    asked = Counting()
    with pytest.raises(UserError, match=problem):
        answer_file(settings(tmp_path), asked)
    assert asked.loaded == []
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    answer_file(settings(tmp_path), Counting())
    for records in (RECORDS[:2], RECORDS[::-1], [*RECORDS, {"prompt": "More"}]):
        with pytest.raises(UserError, match="was made with other prompts"):
            answer_file(settings(tmp_path), Counting(), records)


def test_a_file_that_another_process_writes_into_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing into it"):
            answer_file(settings(tmp_path), Counting())
    answer_file(settings(tmp_path), Counting())  # a file that is empty can be taken


def test_a_full_disk_is_said_and_what_is_complete_stays(tmp_path: Path) -> None:
    answer_file(settings(tmp_path, output=str(tmp_path / "whole.jsonl")), Counting())
    whole = (tmp_path / "whole.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Room for the settings, and for a part of the results.
        record = RECORDS[0] | {"long": "x" * 1500}
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(UserError, match=r"output=.*a\.jsonl cannot be written: File too large"):
            answer_file(settings(tmp_path), Counting(), [record] * 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.jsonl").stat().st_size == 4000
    answer_file(settings(tmp_path), Counting(), [record] * 4)
    assert len(results(tmp_path / "a.jsonl")) == 4
    assert (tmp_path / "whole.jsonl").read_bytes() == whole


@pytest.mark.parametrize("place", ["folder", "file/a.jsonl", "/dev/null"])
def test_an_output_that_cannot_be_one_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    asked = Counting()
    with pytest.raises(
        UserError, match=r"output=.*(it must be a file|cannot be written: (Not a directory|File exists))"
    ):
        answer_file(settings(tmp_path, output=str(tmp_path / place)), asked)
    assert asked.loaded == []


# Two models


def test_a_comparison_has_the_answers_of_both_models(tmp_path: Path, tokenizer: Tokenizer) -> None:
    decoding = DecodingConfig(max_new_tokens=8)
    folder = trained_adapter(tmp_path / "run")
    tuned, plain = make_model(SMALL), make_model(SMALL)
    load_adapter(tuned, folder, True)
    asked: dict[bool, Transformer] = {True: plain, False: tuned}

    def load(is_base: bool) -> GenerateFn:
        return lambda prompts, on_text: generate(asked[is_base], tokenizer, prompts, decoding)

    config = settings(tmp_path, decoding=decoding, adapter=str(folder), compare=True)
    prompts = [Prompt(text, {"prompt": text}) for text in TEXTS]
    PromptFile(config, prompts, "float32", load, no_progress, ignore).answer()
    for text, found in zip(TEXTS, results(tmp_path / "a.jsonl"), strict=True):
        ((base,),), ((answer,),) = (generate(each, tokenizer, [text], decoding) for each in (plain, tuned))
        assert found == {
            "prompt": text,
            "base_answer": base.text,
            "answer": answer.text,
            "finish": answer.finish,
            "n_tokens": answer.n_tokens,
        }
        assert base.text != answer.text
