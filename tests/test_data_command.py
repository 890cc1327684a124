"""`python -m llama_ft.data`: its figures against numpy's and SentencePiece's, and what it shows."""

import io
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import sentencepiece
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llama_ft import cli
from llama_ft.config import PACKAGE_DIR, DataCommandConfig, UserError
from llama_ft.data.__main__ import main
from llama_ft.data.inspection import histogram, inspect_data
from llama_ft.data.inspection import parts as parts_of
from llama_ft.data.prompt import prompt_text
from llama_ft.data.records import Record, Sample
from llama_ft.data.template import ALPACA_TEMPLATE
from llama_ft.data.tokenizer import Tokenizer, load_tokenizer
from llama_ft.records import read_record
from llama_ft.records.data import DataReport
from llama_ft.reporting.data import data_markdown, print_data

GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}
TINY = Tokenizer(PACKAGE_DIR / "model" / "tiny" / "tokenizer.model")


def report_of(*overrides: object) -> DataReport:
    config = cli.composed_config("data", list(map(str, overrides)), DataCommandConfig)
    return inspect_data(config, load_tokenizer(config), "a command", print)


@pytest.fixture
def records(tmp_path) -> Path:
    """A long one, one with no answer, one that is there three times."""
    rows: list[dict[str, Any]] = [GOOD, GOOD | {"output": " \n"}, GOOD, GOOD | {"output": "word " * 300}, GOOD]
    rows.append(GOOD | {"task": "other"})  # the same text
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def printed(report: DataReport, **options: Any) -> str:
    out = io.StringIO()
    print_data(report, Console(file=out, width=100, **options))
    return out.getvalue()


# Figures


def test_figures_of_the_real_records(test_data):
    file, model = test_data / "alpaca_data_200.json", test_data / "llama2_tokenizer.model"
    report = report_of("model=llama2_7b", f"tokenizer={model}", f"data.path={file}")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lengths, answers = [], 0
    for record in json.loads(file.read_text(encoding="utf-8")):
        prompt = prompt_text(record["instruction"], record["input"])
        whole, start = processor.encode(prompt + record["output"]), processor.encode(prompt)
        lengths.append(len(whole) + 2)
        shared = next((n for n, pair in enumerate(zip(start, whole, strict=False)) if len({*pair}) > 1), len(start))
        answers += len(whole) - shared + 1
    assert (report.records, report.tokens) == (200, 24_200)
    assert (report.lengths["median"], report.lengths["longest"]) == (96, 405)
    assert report.trained_tokens == answers
    p90, p99 = numpy.percentile(lengths, [90, 99], method="inverted_cdf")
    found = report.lengths
    assert (found["shortest"], found["p90"], found["p99"]) == (min(lengths), p90, p99)
    assert found["mean"] == pytest.approx(numpy.mean(lengths))
    assert report.histogram == {
        "0 – 49": 1,
        "50 – 99": 103,
        "100 – 149": 53,
        "150 – 199": 21,
        "200 – 249": 13,
        "250 – 299": 1,
        "300 or more": 8,
    }
    assert (report.template, report.ends, report.too_long.records) == ("alpaca", ["</s>"], 0)
    first, middle, longest = report.examples
    assert (first.where, middle.tokens, longest.tokens) == ("record 0", sorted(lengths)[99], 405)


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 200_000), min_size=1, max_size=60).map(sorted))
def test_every_record_is_in_one_bar(lengths):
    bars = histogram(lengths)
    starts = [int(name.split()[0].replace(",", "")) for name in bars]
    assert list(bars.values()) == numpy.histogram(lengths, [*starts, max(lengths) + 1])[0].tolist()
    assert 1 <= len(bars) <= 12
    assert len({later - earlier for earlier, later in pairwise(starts)}) <= 1
    *others, last = bars
    assert all(int(name.split()[-1].replace(",", "")) + 1 in starts for name in others)
    assert last.endswith("or more") or int(last.split()[-1].replace(",", "")) >= max(lengths)


@pytest.mark.parametrize(
    ("policy", "counts", "said"),
    [
        ("truncate", (1, 0), "data.on_long=truncate, 1 cut, 0 left out: first record 3 (line 4)."),
        ("drop", (0, 1), "data.on_long=drop, 0 cut, 1 left out: first record 3 (line 4)."),
        ("error", (0, 0), "data.on_long=error, a run stops: first record 3 (line 4)."),
    ],
)
def test_what_is_the_matter_with_records_is_said(records, policy, counts, said):
    report = report_of(f"data.path={records}", "data.max_length=100", f"data.on_long={policy}")
    assert (report.duplicates.records, report.duplicates.first) == (3, ["record 0 (line 1)", "record 2 (line 3)"])
    assert (report.empty_answers.records, report.empty_answers.first) == (1, ["record 1 (line 2)"])
    assert (report.too_long.records, report.truncated, report.dropped) == (1, *counts)
    lengths = sorted(example.tokens for example in report.examples)
    text = printed(report)
    for line in (
        f"More than 100 tokens, {said}",
        "Duplicates: first record 0 (line 1), record 2 (line 3).",
        "Empty answers: first record 1 (line 2).",
    ):
        assert line in text
    assert lengths[-1] > 300  # the longest is shown whole, whatever becomes of it


def test_bad_records_and_none(records):
    records.write_text(records.read_text() + "\n\n{}\n")
    with pytest.raises(UserError, match=r"record 6 \(line 8\): instruction is missing"):
        report_of(f"data.path={records}")
    assert "Bad records skipped: 1." in printed(report_of(f"data.path={records}", "data.on_bad_record=skip"))
    records.write_text("")
    with pytest.raises(UserError, match="there are no records"):
        report_of(f"data.path={records}")


# Examples


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(output=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\ufffd"), max_size=20))
def test_an_example_is_the_text_in_its_parts(output):
    record = Record("Say it.", "", output)
    parts = parts_of(ALPACA_TEMPLATE.sample(record, TINY), TINY)
    assert "".join(text for text, _ in parts) == f"<s>{prompt_text('Say it.')}{output}</s>"
    assert [is_trained_on for _, is_trained_on in parts] == [False, True]
    assert parts[1][0] in (f"{output}</s>", f":{output}</s>")  # the colon where one piece is both


def test_parts_of_a_conversation_and_characters_that_are_split():
    tokens = TINY.encode("Hi 日本 there", bos=True, eos=True)
    whole = "".join(text for text, _ in parts_of(Sample(tokens, ()), TINY))
    for edge in range(2, len(tokens) - 1):
        spans = ((1, 2), (edge, len(tokens) - 1)) if edge > 2 else ((edge, len(tokens) - 1),)
        parts = parts_of(Sample(tokens, spans), TINY)
        assert "".join(text for text, _ in parts) == whole == "<s>Hi 日本 there</s>"
        assert sum(is_trained_on for _, is_trained_on in parts) == len(spans)


def test_what_is_trained_on_is_in_color_or_between_marks(records):
    report = report_of(f"data.path={records}")
    assert "### Response:⟦Hello.</s>⟧\n" in printed(report)
    in_color = printed(report, force_terminal=True, color_system="standard", legacy_windows=False)
    assert "### Response:\x1b[1;32mHello.</s>\x1b[0m" in in_color
    assert "trained parts are in color" in in_color
    assert "⟦" not in in_color


def test_a_long_part_is_shortened_on_the_screen_alone(tmp_path):
    file = tmp_path / "records.json"
    file.write_text(json.dumps([GOOD | {"output": "```python\n" + "word " * 900}]))
    report = report_of(f"data.path={file}", "model=tiny")
    text = data_markdown(report)
    assert "characters …]" in text
    assert "````text\n" in text  # a fence that the text does not close
    assert len(report.examples[0].parts[1][0]) > 4500


# The command


def called(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["data", *map(str, arguments)])
    return main()


def test_results_are_written_where_asked_for_and_nowhere_else(records, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert called(monkeypatch, f"data.path={records}") == 0
    assert {file.name for file in tmp_path.iterdir()} == {"records.jsonl"}
    shown = capsys.readouterr().out
    assert called(monkeypatch, f"data.path={records}", "output=here") == 0
    assert capsys.readouterr().out.startswith(shown.rstrip("\n"))
    report = read_record(DataReport, tmp_path / "here" / "data.json")
    assert report.settings["data"]["path"] == str(records)
    text = (tmp_path / "here" / "data.md").read_text(encoding="utf-8")
    assert text == data_markdown(report)
    for part in ("| Records | 6 |", "| the same as an earlier one | 3 |", "| Tokens | Records |", "⟦Hello.</s>⟧"):
        assert part in text
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds data\.json, which llama_ft did not write"):
        called(monkeypatch, f"data.path={records}", "output=other")


@pytest.mark.process
def test_a_terminal_of_few_letters(records, tmp_path):
    done = run("llama_ft", "data", f"data.path={records}", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "####" in done.stdout
    assert "### Response:[Hello.</s>]" in done.stdout
    assert "?" not in done.stdout
