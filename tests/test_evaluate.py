"""`python -m llama_ft.evaluate`: transformers' perplexity, answers one by one, the table, and what is refused."""

import io
import json
import math
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from helpers.models import SMALL, make_model, reference, trained_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llama_ft import evaluate
from llama_ft.config import DataConfig, DecodingConfig, EvaluateConfig, ModelConfig, ModelSource, OnBadRecord, UserError
from llama_ft.data.collate import Padding
from llama_ft.data.dataset import SAMPLE_DIR
from llama_ft.data.prompt import prompt_text
from llama_ft.data.records import Record, Sample
from llama_ft.data.template import ALPACA_TEMPLATE
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import generate
from llama_ft.evaluation import measures
from llama_ft.evaluation.measures import greedy_answers
from llama_ft.evaluation.perplexity import bits_per_byte, perplexity, read_text, text_windows
from llama_ft.evaluation.records import NO_TASK, EvaluationSet, accuracy, load_records, majority_of, matches
from llama_ft.files import locked
from llama_ft.model.transformer import Transformer
from llama_ft.records import read_record
from llama_ft.records.evaluation import Accuracy, Evaluation, Share
from llama_ft.reporting import progress
from llama_ft.reporting.table import Table, print_table
from llama_ft.techniques.adapter import load_adapter
from llama_ft.training.saver import save_trained

SIZES = [f"model.{key}={getattr(SMALL, key)}" for key in "dim n_layers n_heads n_kv_heads ffn_dim max_seq_len".split()]
RECORDS = [
    {"instruction": "Name the capital of France.", "output": "Paris", "task": "capital"},
    {"instruction": "Name the capital of Italy.", "input": "", "output": "Rome", "task": "capital"},
    {"instruction": "Say yes.", "input": None, "output": " yes ", "task": "say"},
    {"instruction": "Write it twice.", "input": "a longer word than that", "output": "no no", "task": "a | b"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ModelSource(model=SMALL).tokenizer_file)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model(SMALL)


def records_file(folder: Path, records: list[dict[str, Any]]) -> Path:
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def config_of(model: ModelConfig = SMALL, data: dict[str, Any] | None = None, **settings: Any) -> EvaluateConfig:
    return EvaluateConfig(model=model, data=DataConfig("sample", **data or {}), **settings)


def evaluation_set(tokenizer: Tokenizer, **settings: Any) -> EvaluationSet:
    return load_records(config_of(**settings), tokenizer, ALPACA_TEMPLATE, lambda line: None)


# Perplexity of a text


def transformers_perplexity(model: Transformer, tokens: list[int], window: int, stride: int) -> float:
    """The loop of transformers' page on the perplexity of models of fixed length."""
    hf, total, count, previous_end = reference(model), 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        input_ids = torch.tensor([tokens[begin:end]])
        labels = input_ids.clone()
        labels[:, : -(end - previous_end)] = -100
        n_counted = int((labels[:, 1:] != -100).sum())
        if n_counted:
            with torch.no_grad():
                total += hf(input_ids, labels=labels).loss.item() * n_counted
        count += n_counted
        previous_end = end
        if end == len(tokens):
            break
    return math.exp(total / count)


@pytest.mark.parametrize(
    ("n_tokens", "window", "stride"),
    [
        (300, 128, 64),
        (300, 128, 128),
        (257, 128, 128),  # the last window has a single token
        (100, 32, 8),
        (101, 32, 31),  # a last partial window
        (50, 128, 64),  # shorter than a window
        (128, 128, 1),
        (20, 2, 1),
        (21, 2, 2),
        (2, 128, 64),
    ],
)
def test_perplexity_of_a_text_is_that_of_transformers(
    model: Transformer, n_tokens: int, window: int, stride: int
) -> None:
    tokens = torch.randint(3, SMALL.vocab_size, (n_tokens,), generator=torch.Generator().manual_seed(n_tokens)).tolist()
    found = perplexity(
        model, text_windows(tokens, window, stride), batch_size=3, padding=Padding(32, SMALL.max_seq_len)
    )
    assert found.perplexity == pytest.approx(transformers_perplexity(model, tokens, window, stride), rel=1e-4)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_each_token_counts_once_with_enough_before_it(data: st.DataObject) -> None:
    n_tokens = data.draw(st.integers(2, 60))
    window = data.draw(st.integers(2, 70))
    stride = data.draw(st.integers(1, window))
    counted: list[int] = []
    for number, sample in enumerate(text_windows(range(n_tokens), window, stride)):
        assert sample.tokens == list(range(sample.tokens[0], sample.tokens[0] + len(sample)))
        assert len(sample) <= window
        assert sample.n_prompt >= (window - stride if number else 1)
        counted += sample.tokens[sample.n_prompt :]
    starts = range(0, n_tokens, window) if stride == window else [0]
    assert counted == [token for token in range(n_tokens) if token not in starts]


@pytest.mark.parametrize("stride", [64, 128])
def test_a_uniform_models_numbers_are_known(tmp_path: Path, tokenizer: Tokenizer, stride: int) -> None:
    uniform = make_model(SMALL)
    torch.nn.init.zeros_(uniform.output.weight)
    (tmp_path / "a.txt").write_bytes("Zwölf Boxkämpfer\r\n".encode() * 20)
    text = read_text(tmp_path / "a.txt", tokenizer)
    assert text.n_bytes == 20 * 20
    assert text.tokens == tokenizer.encode("Zwölf Boxkämpfer\r\n" * 20, bos=True)
    found = perplexity(uniform, text_windows(text.tokens, 128, stride), 2)
    assert found.perplexity == pytest.approx(SMALL.vocab_size)
    n_windows = math.ceil(len(text.tokens) / 128)
    assert n_windows > 1
    assert found.tokens == len(text.tokens) - (n_windows if stride == 128 else 1)
    assert bits_per_byte(found.nll, text) == pytest.approx(11 * (len(text.tokens) - 1) / 400)  # 2**11 pieces


def test_numbers_that_are_none_are_refused() -> None:
    damaged = make_model(SMALL)
    damaged.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="the loss is nan in float32"):
        perplexity(damaged, [Sample.after([1, 2, 3], 1)], 1)


# Perplexity of responses


def test_perplexity_of_responses_is_that_of_transformers(model: Transformer, tokenizer: Tokenizer) -> None:
    """Every target token weighs the same, however long the answer that it is in."""
    samples = evaluation_set(tokenizer, max_samples=12).samples
    samples = [sample for sample in samples if len(sample) <= SMALL.max_seq_len]
    hf, total = reference(model), 0.0
    for sample in samples:
        labels = torch.tensor([[-100] * sample.n_prompt + sample.tokens[sample.n_prompt :]])
        assert sample.tokens[-1] == tokenizer.eos_id
        with torch.no_grad():
            total += hf(torch.tensor([sample.tokens]), labels=labels).loss.item() * sample.n_targets
    n_tokens = sum(sample.n_targets for sample in samples)
    assert len({sample.n_targets for sample in samples}) > 1
    steps: list[int] = []
    found = perplexity(model, samples, 5, advance=steps.append)
    assert found.perplexity == pytest.approx(math.exp(total / n_tokens), rel=1e-4)
    assert (found.tokens, sum(steps)) == (n_tokens, len(samples))


# The records


def test_the_built_in_records_are_those_that_training_never_sees(tokenizer: Tokenizer) -> None:
    wide = replace(SMALL, max_seq_len=1024)
    found = evaluation_set(tokenizer, model=wide)
    held_out, train = (
        [json.loads(line) for line in (SAMPLE_DIR / f"{split}.jsonl").read_text().splitlines()]
        for split in ("heldout", "train")
    )
    assert [record.instruction for record in found.records] == [record["instruction"] for record in held_out]
    assert [record.task for record in found.records] == [record["task"] for record in held_out]
    assert found.about.is_held_out
    for task, answer in found.majority.answers.items():
        counts = Counter(record["output"] for record in train if record["task"] == task)
        assert counts[answer] == max(counts.values())
    assert found.majority.answers.keys() == {record["task"] for record in train}
    first = evaluation_set(tokenizer, model=wide, max_samples=5, data={"first": 9})
    assert (first.records, first.majority.answers) == (found.records[:5], found.majority.answers)


def test_records_of_ones_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long, bad = {"instruction": "word " * 200, "output": "x"}, {"instruction": "No answer."}
    cut = {"instruction": "Say much.", "output": "much " * 100}
    file = records_file(tmp_path, [*RECORDS, long, bad, cut])
    with pytest.raises(UserError, match=r"record 5 \(line 6\): output is missing"):
        evaluation_set(tokenizer, data={"path": str(file)})
    found = evaluation_set(tokenizer, data={"path": str(file), "on_bad_record": OnBadRecord.skip})
    assert [record.task for record in found.records] == ["capital", "capital", "say", "a | b", NO_TASK]
    about = found.about
    assert (about.skipped, about.dropped, about.truncated, about.is_held_out) == (1, 1, 1, False)
    assert found.majority.answers == {
        "capital": "Paris",
        "say": "yes",
        "a | b": "no no",
        NO_TASK: ("much " * 100).strip(),
    }
    assert len(found.samples[-1]) == SMALL.max_seq_len
    with pytest.raises(UserError, match="no prompt leaves room for an answer"):
        evaluation_set(tokenizer, data={"path": str(records_file(tmp_path, [long]))})
    with pytest.raises(UserError, match="there are no records"):
        evaluation_set(tokenizer, data={"path": str(records_file(tmp_path, []))})


def test_majority_answers_by_hand() -> None:
    answers = [("a", "x"), ("a", "y"), ("b", "z"), ("a", "y "), ("b", "w"), ("c", "only")]
    records = [Record("", "", output, task) for task, output in answers]
    majority = majority_of(records, records, "same records")
    assert majority.answers == {"a": "y", "b": "z", "c": "only"}
    assert (majority.correct, majority.tasks["a"]) == (4, Share(2, 3, 2 / 3))


# Exact match


def test_answers_are_those_to_each_prompt_by_itself(model: Transformer, tokenizer: Tokenizer) -> None:
    prompts = ["Hello", "What is the plural of fox?", "Two and two are", "a", "Once upon a time there was a fox that"]
    steps: list[int] = []
    together = greedy_answers(model, tokenizer, prompts, config_of(max_new_tokens=10, batch_size=2), steps.append)
    decoding = DecodingConfig(max_new_tokens=10)
    alone = [generate(model, tokenizer, [prompt], decoding, kv_cache=False)[0][0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answer in together}) == len(prompts)
    assert steps == [2, 2, 1]


def test_accuracy_by_hand() -> None:
    assert matches(" yes\n", "yes")
    assert not matches("Yes", "yes")
    found = accuracy(["b", "a", "b", "b"], [True, False, False, True])
    assert found == Accuracy(2, 4, 0.5, {"a": Share(0, 1, 0.0), "b": Share(2, 3, 2 / 3)})
    assert accuracy([NO_TASK, NO_TASK], [True, False]).tasks == {}


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "PLAIN_SECONDS", -1)
    with progress.progress_bar(Console(file=written), "base, answers", 7) as advance:
        advance(3)
        advance(4)
    assert written.getvalue() == "  base, answers: 3/7\n  base, answers: 7/7\n"


# The command, in this process


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[dict[str, Any], str]]]:
    """Evaluates a small model on RECORDS in an empty folder; gives evaluate.json and standard output."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = records_file(tmp_path, RECORDS)

    def evaluated(*arguments: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(
            sys, "argv", ["evaluate", "gpu=cpu", "checkpoint=random", *SIZES, f"data.path={file}", *arguments]
        )
        assert evaluate.main() == 0
        written = capsys.readouterr().out
        folder = Path(re.findall(r"^Written: .* in (.*)$", written, re.MULTILINE)[0])
        return json.loads((folder / "evaluate.json").read_text()) | {"folder": folder}, written

    return evaluated


def saved(folder: Path) -> Path:
    """What a run without LoRA leaves."""
    folder.mkdir()
    save_trained(make_model(SMALL), folder)
    return folder


def test_base_against_an_adapter(tmp_path: Path, command: Callable[..., Any], tokenizer: Tokenizer) -> None:
    adapter, weights = trained_adapter(tmp_path / "run"), saved(tmp_path / "weights")
    (tmp_path / "book.txt").write_text("Once upon a time there was a fox. " * 40)
    options = ["max_new_tokens=6", f"text={tmp_path / 'book.txt'}", "window=100", "stride=50"]
    result, written = command(f"checkpoint={weights}", f"adapter={adapter}", *options)
    assert [(m["role"], m["checkpoint"], m["adapter"]) for m in result["models"]] == [
        ("base", str(weights), None),
        ("fine_tuned", str(weights), str(adapter)),
    ]
    samples = evaluation_set(tokenizer, data={"path": str(tmp_path / "records.jsonl")}).samples
    windows = text_windows(tokenizer.encode((tmp_path / "book.txt").read_text(), bos=True), 100, 50)
    truths = [make_model(SMALL), make_model(SMALL)]
    load_adapter(truths[1], adapter)
    for found, truth in zip(result["models"], truths, strict=True):
        assert found["responses"]["perplexity"] == pytest.approx(perplexity(truth, samples, 1).perplexity, rel=1e-4)
        assert found["text"]["perplexity"] == pytest.approx(perplexity(truth, windows, 1).perplexity, rel=1e-4)
        assert found["text"]["windows"] == len(windows)
    base, fine_tuned = (found["responses"]["perplexity"] for found in result["models"])
    assert abs(base - fine_tuned) > 0.01 * base
    # What is printed is what is written.
    table = (result["folder"] / "evaluate.md").read_text()
    assert "|  | Majority | Base: weights | Fine-tuned |" in table
    assert re.search(rf"^\| responses \| – \| {base:,.0f} \| {fine_tuned:,.0f} \|$", table, re.MULTILINE)
    assert re.search(rf"^  responses +– +{base:,.0f} +{fine_tuned:,.0f}$", written, re.MULTILINE)
    assert r"| a \| b (1) | 100.0% | 0.0% | 0.0% |" in table
    assert "Majority: the most frequent answer of each task in the same records." in written
    assert f"Fine-tuned: checkpoint={weights} with adapter={adapter}." in written
    assert "in windows of 100, a new one every 50" in written
    # The answers, and what is counted of them.
    lines = [json.loads(line) for line in (result["folder"] / "answers.jsonl").read_text().splitlines()]
    assert [line["expected"] for line in lines] == [record["output"] for record in RECORDS]
    assert [line["task"] for line in lines] == [record["task"] for record in RECORDS]
    for role, truth, found in zip(("base", "fine_tuned"), truths, result["models"], strict=True):
        prompts = [prompt_text(str(record["instruction"]), str(record.get("input") or "")) for record in RECORDS]
        answers = greedy_answers(truth, tokenizer, prompts, config_of(max_new_tokens=6, batch_size=1), lambda n: None)
        assert [line[f"{role}_answer"] for line in lines] == [answer.text for answer in answers]
        assert sum(line[f"{role}_correct"] for line in lines) == found["exact_match"]["correct"]
        n_cut = sum(answer.finish == "length" for answer in answers)
        assert found["exact_match"]["ended_by_length"] == n_cut > 0
    majority = result["majority"]
    assert (majority["accuracy"], majority["tasks"]["capital"]["accuracy"]) == (0.75, 0.5)
    assert majority["answers"] == {"capital": "Paris", "say": "yes", "a | b": "no no"}
    assert (result["settings"]["window"], result["settings"]["dtype"], result["dtype"]) == (100, "auto", "float32")


def test_base_against_all_weights_and_a_single_model(tmp_path: Path, command: Callable[..., Any]) -> None:
    folder = saved(tmp_path / "weights")
    both, written = command(f"checkpoint={folder}", "base=random", "exact_match=false")
    assert [(m["role"], m["checkpoint"]) for m in both["models"]] == [("base", "random"), ("fine_tuned", str(folder))]
    assert both["majority"] is None
    assert "Majority" not in written
    assert sorted(file.name for file in both["folder"].iterdir()) == ["evaluate.json", "evaluate.md"]
    one, written = command(f"checkpoint={folder}", "exact_match=false", "output=one")
    assert re.search(r"^ +weights$", written, re.MULTILINE)  # the heading
    assert one["models"][0]["responses"] == both["models"][1]["responses"]
    swapped, _ = command("checkpoint=random", f"base={folder}", "exact_match=false", "output=swapped")
    assert [m["responses"] for m in swapped["models"]] == [m["responses"] for m in reversed(both["models"])]


def test_one_model_is_in_memory_at_a_time(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    earlier: list[weakref.ref[Transformer]] = []

    def watched(load: Callable[..., Transformer]) -> Callable[..., Transformer]:
        def loading(*arguments: Any) -> Transformer:
            assert [reference() for reference in earlier] == [None] * len(earlier)
            loaded = load(*arguments)
            earlier.append(weakref.ref(loaded))
            return loaded

        return loading

    monkeypatch.setattr(measures, "load_trained", watched(measures.load_trained))
    monkeypatch.setattr(measures, "load_base", watched(measures.load_base))
    command("base=random", "max_new_tokens=2")
    assert len(earlier) == 2


def test_a_folder_is_used_again_and_not_by_two(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = command("output=results", "max_new_tokens=2")
    assert (Path("results") / "answers.jsonl").exists()
    again, _ = command("output=results", "exact_match=false", "dtype=bf16")
    assert sorted(file.name for file in Path("results").iterdir()) == ["evaluate.json", "evaluate.md"]
    values = [found["models"][0]["responses"]["perplexity"] for found in (first, again)]
    assert values[0] != values[1] == pytest.approx(values[0], rel=0.02)
    with locked(Path("results")), pytest.raises(UserError, match="another run is writing into results"):
        command("output=results")

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(measures, "measure_models", full)
    with pytest.raises(UserError, match="out of memory: lower batch_size"):
        command("output=a/b/c")
    assert [path.name for path in Path().iterdir()] == ["results"]


# What is refused


WRONG = {
    "text=missing.txt": r"text=missing\.txt cannot be read: No such file",
    "text=.": r"text=\. cannot be read: Is a directory",
    "text=empty.txt": r"text=empty\.txt is empty",
    "text=latin1.txt": r"text=latin1\.txt cannot be read: line 1 is not UTF-8 text",
    'text=""': "text=.* is not allowed: it must be a text",
    "window=64 stride=65": "stride=65 is not allowed: it must be between 1 and the window of 64",
    "window=64": "window and stride need text=FILE",
    "merge=false": "merge=false keeps an adapter separate, and there is none",
    "exact_match=1": "exact_match=1 is not allowed: it must be true or false",
    "data.path=empty.txt": r"empty\.txt: there are no records",
    "data.path=missing.json": r"data file missing\.json cannot be read",
    "adapter=nowhere": "adapter=nowhere: ",
    "adapter=run model.dim=32": r"does not fit model=tiny: model\.dim is 32 but the file has 64",
    "base=nowhere": "base=nowhere: there is no such folder",
    "checkpoint=nowhere": "checkpoint=nowhere: there is no such folder",
    "base=builtin model.name=other checkpoint=random tokenizer=t": "base=builtin: model=other has no built-in weights",
    "output=latin1.txt": r"output=latin1\.txt: the folder cannot be created",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_is_said_and_leaves_nothing(
    tmp_path: Path, command: Callable[..., Any], arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").touch()
    Path("latin1.txt").write_bytes("süß".encode("latin-1"))
    if "adapter=run" in arguments:
        trained_adapter(Path("run"))
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=WRONG[arguments]) as error:
        command(*arguments.split())
    assert "\n" not in str(error.value)
    assert sorted(Path().rglob("*")) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"window": 129}, r"between 2 and model\.max_seq_len=128, or null"),
        ({"window": 1}, r"between 2 and model\.max_seq_len=128, or null"),
        ({"stride": 0}, "between 1 and the window of 128, or null"),
        ({"stride": 129}, "between 1 and the window of 128, or null"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_samples": 0}, "at least 1, or null"),
        ({"data": {"max_length": 200}}, r"at most model\.max_seq_len=128"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], allowed: str) -> None:
    (key,) = settings
    with pytest.raises(UserError, match=rf"^{key}(\.max_length)?=\d+ is not allowed: it must be {allowed}$"):
        config_of(**settings)


def test_windows_and_strides_that_are_allowed() -> None:
    found = [(config.window_tokens, config.stride_tokens) for config in (config_of(), config_of(window=2, text="t"))]
    assert found == [(128, 64), (2, 1)]
    assert config_of(window=128, stride=128, text="t").stride_tokens == 128
    with pytest.raises(UserError, match=r"data=mine needs data\.path=FILE"):
        EvaluateConfig(model=SMALL, data=DataConfig("mine"))


# The command, by itself


@pytest.mark.process
def test_the_whole_command(tmp_path: Path) -> None:
    done = run("llama_ft.evaluate", "max_samples=3", "max_new_tokens=2", "checkpoint=random", cwd=tmp_path)
    assert done.returncode == 0
    assert re.fullmatch("template: alpaca\ndevice: .*\n", done.stderr)
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith("\ntiny, 3 held-out records of sample\n")
    (folder,) = (tmp_path / "outputs" / "evaluations").iterdir()
    assert f"Written: answers.jsonl, evaluate.md, evaluate.json in {folder.relative_to(tmp_path)}" in done.stdout
    assert sorted(file.name for file in folder.iterdir()) == ["answers.jsonl", "evaluate.json", "evaluate.md"]
    result = json.loads((folder / "evaluate.json").read_text())
    assert (result["schema_version"], result["model"], result["data"]["records"]) == (2, "tiny", 3)
    assert read_record(Evaluation, folder / "evaluate.json").models[0].checkpoint == "random"
    assert result["command"] == "python -m llama_ft.evaluate max_samples=3 max_new_tokens=2 checkpoint=random"
    assert result["versions"]["torch"] == torch.__version__
    assert [found["checkpoint"] for found in result["models"]] == ["random"]
    assert "Majority: the most frequent answer of each task in the training split." in done.stdout


def test_what_is_in_brackets_or_between_colons_is_shown_as_it_is() -> None:
    table = Table("title", [("", ["run[v2]"])], [("math [easy]", ["1"]), (":smile: [/b]", ["2"])], [])
    written = io.StringIO()
    print_table(table, Console(file=written, width=80))
    assert all(text in written.getvalue() for text in ("run[v2]", "math [easy]", ":smile: [/b]"))
