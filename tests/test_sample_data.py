"""The built-in data set and tiny's tokenizer: right, and still what the script writes."""

import calendar
import json
import random
import re
from collections import Counter
from pathlib import Path
from statistics import median

import pytest
import sentencepiece

from dev import sample, words
from llama_ft.config import PACKAGE_DIR
from llama_ft.data.dataset import SAMPLE_DIR
from llama_ft.data.prompt import prompt_text

TOKENIZER = PACKAGE_DIR / "model" / "tiny" / "tokenizer.model"
SPLITS = ("train", "heldout")
TASKS = [task.name for task in sample.TASKS]
DAYS, MONTHS = list(calendar.day_name), list(calendar.month_name)[1:]
COLOURS = {"red", "blue", "green", "yellow", "black", "white", "brown", "purple", "orange", "pink"}
GOOD = {
    "wonderful", "great", "excellent", "lovely", "perfect", "delightful", "brilliant", "superb", "charming", "pleasant",
}  # fmt: skip
BAD = {
    "terrible", "awful", "boring", "horrible", "dreadful", "poor", "disappointing", "bad", "unpleasant", "annoying",
}  # fmt: skip


def load(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLE_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


RECORDS = {split: load(split) for split in SPLITS}


def of_task(task: str, *splits: str) -> list[dict[str, str]]:
    return [record for split in splits or SPLITS for record in RECORDS[split] if record["task"] == task]


def subject(record: dict[str, str]) -> str:
    """What the question is about: the numbers in it, the input, or what the instruction puts in quotes."""
    if record["task"] in ("add", "larger_number"):
        return " ".join(map(str, sorted(numbers(record))))
    if record["task"] in ("sort_numbers", "number_in_words"):
        return " ".join(map(str, numbers(record)))
    if record["input"]:
        # Some wordings put the question behind the text.
        return record["input"].split("\n")[0].removeprefix("Text: ")
    return re.search('"(.+)"', record["instruction"])[1]


def numbers(record: dict[str, str]) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", record["instruction"] + " " + record["input"])]


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))


def pieces(tokenizer: sentencepiece.SentencePieceProcessor) -> list[str]:
    return [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]


# --- the files ---


def test_script_writes_the_files_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer):
    monkeypatch.setattr("sys.argv", ["sample", "--out", str(tmp_path / "new")])
    random.seed(0)  # the script must not depend on the global generator
    sample.main()
    for split in SPLITS:
        assert (tmp_path / "new" / f"{split}.jsonl").read_bytes() == (SAMPLE_DIR / f"{split}.jsonl").read_bytes()
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "new" / "tokenizer.model"))
    assert pieces(again) == pieces(tokenizer)


def test_counts():
    assert (len(RECORDS["train"]), len(RECORDS["heldout"])) == (1620, 324)
    assert len(TASKS) == len(set(TASKS)) == 18
    assert Counter(record["task"] for record in RECORDS["train"]) == dict.fromkeys(TASKS, 90)
    assert Counter(record["task"] for record in RECORDS["heldout"]) == dict.fromkeys(TASKS, 18)


def test_records_are_clean():
    for record in RECORDS["train"] + RECORDS["heldout"]:
        assert list(record) == ["instruction", "input", "output", "task"]
        assert record["instruction"]
        assert record["output"]
        assert all(value == value.strip() and "{" not in value for value in record.values())


def test_no_question_is_asked_twice():
    asked = [(record["instruction"], record["input"]) for split in SPLITS for record in RECORDS[split]]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("task", TASKS)
def test_heldout_subjects_are_new(task: str):
    if task == "calendar":
        pytest.skip("there are seven days and twelve months; only their wordings can be new")
    train, heldout = ([subject(record) for record in of_task(task, split)] for split in SPLITS)
    assert not set(train) & set(heldout)
    assert len(set(train)) == 90
    assert len(set(heldout)) == 18


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_no_answer_dominates(task: str, split: str):
    answers = Counter(record["output"] for record in of_task(task, split))
    share = max(answers.values()) / answers.total()
    # Half in the two tasks of two answers, at most a sixth elsewhere.
    assert share <= (1 / 2 if task in ("sentiment", "contains_letter") else 1 / 6)


# --- the answers, worked out a second time from the question as it is written ---


def test_uppercase_and_spell():
    for record in of_task("uppercase"):
        assert record["output"] == "".join(chr(ord(letter) - 32) for letter in subject(record))
    for record in of_task("spell"):
        assert record["output"][::2] == subject(record)
        assert set(record["output"][1::2]) == {"-"}


def test_contains_letter():
    for record in of_task("contains_letter"):
        letter = re.search(r"the letter ([a-z])\b", record["instruction"])[1]
        assert record["output"] == ("yes" if subject(record).count(letter) else "no"), record


def test_plural():
    irregular = {
        "man": "men", "woman": "women", "child": "children", "foot": "feet", "tooth": "teeth", "goose": "geese",
        "mouse": "mice", "person": "people", "ox": "oxen", "sheep": "sheep", "fish": "fish", "deer": "deer",
    }  # fmt: skip
    # From the plural back to the noun, the other way round than the script goes.
    rules = [("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")]
    for record in of_task("plural"):
        noun, plural = subject(record), record["output"]
        if noun in irregular:
            assert plural == irregular[noun]
            continue
        singulars = {plural.removesuffix(end) + instead for end, instead in rules if plural.endswith(end)}
        assert noun in singulars
        assert plural.endswith("es") or not noun.endswith(("s", "x", "ch", "sh")), record
        assert plural.endswith("ies") == bool(re.search("[^aeiou]y$", noun)), record


def test_past_tense():
    regular = {}
    for record in of_task("past_tense"):
        verb, past = subject(record), record["output"]
        if past.endswith("ed") and verb not in ("feed", "lead"):
            regular[verb] = past
        else:
            assert past != verb
            assert past[0] == verb[0] or verb in ("go", "eat")
    assert len(regular) > 40
    for verb, past in regular.items():
        stem = past.removesuffix("ed")
        doubled = stem[-1] == stem[-2] and stem[:-1] == verb
        assert verb in (stem, stem + "e", stem[:-1] + "y") or doubled
        assert not re.search("[^aeiou]yed$", past)
    some = {"go": "went", "buy": "bought", "write": "wrote", "cry": "cried", "stop": "stopped", "play": "played"}
    assert some.items() <= words.PASTS.items()


def test_opposite():
    answers = {subject(record): record["output"] for record in of_task("opposite")}
    for word, opposite in answers.items():
        assert opposite != word
        assert answers.get(opposite, word) == word  # the opposite's opposite is the word
    some = {"hot": "cold", "cold": "hot", "buy": "sell", "victory": "defeat", "always": "never", "north": "south"}
    assert some.items() <= words.OPPOSITES.items()


def test_category():
    assert len({word for group in words.CATEGORIES.values() for word in group}) == 120
    for record in of_task("category"):
        assert subject(record) in words.CATEGORIES[record["output"]]
    some = {"goat": "animal", "owl": "bird", "fig": "fruit", "leek": "vegetable", "ferry": "vehicle", "judge": "job"}
    assert all(word in words.CATEGORIES[category] for word, category in some.items())


def test_sums_orders_and_comparisons():
    for record in of_task("add"):
        assert int(record["output"]) - numbers(record)[0] == numbers(record)[1]
    for record in of_task("larger_number"):
        assert int(record["output"]) == max(numbers(record))
    for record in of_task("sort_numbers"):
        low, middle, high = map(int, record["output"].split(", "))
        assert low < middle < high
        assert {low, middle, high} == set(numbers(record))


def test_number_in_words():
    value = {name: i for i, name in enumerate(words.ONES)} | {name: 10 * i for i, name in enumerate(words.TENS, 2)}
    for record in of_task("number_in_words"):
        hundred, _, rest = record["output"].rpartition("one hundred")
        assert hundred == ""
        total = sum(value[word] for word in re.findall("[a-z]+", rest) if word != "and")
        assert [total + 100 * ("hundred" in record["output"])] == numbers(record)
    some = {7: "seven", 40: "forty", 99: "ninety-nine", 100: "one hundred", 112: "one hundred and twelve"}
    assert all(sample.number_tasks.number_in_words(number) == text for number, text in some.items())


def test_calendar():
    for record in of_task("calendar"):
        question = f"{record['instruction']} {record['input']}"
        names = DAYS if "day " in question.replace("day,", "day ") and "month" not in question else MONTHS
        (given,) = [name for name in names if re.search(rf"\b{name}\b", question)]
        step = 1 if re.search(r"\bafter\b", question) else -1
        assert record["output"] == names[(names.index(given) + step) % len(names)]


def test_first_last_and_number_of_words():
    for record in of_task("first_word"):
        assert re.match(rf"{record['output']}\b", subject(record))
    for record in of_task("last_word"):
        assert re.search(rf"\b{record['output']}\.$", subject(record))
    for record in of_task("count_words"):
        assert int(record["output"]) == subject(record).count(" ") + 1


def test_find_colour():
    for record in of_task("find_colour"):
        named = [word for word in re.findall(r"\w+", subject(record)) if word in COLOURS]
        assert named == [record["output"]]


def test_who():
    for record in of_task("who"):
        question = re.search(r"Who (\w+) the (\w+)\?", f"{record['instruction']} {record['input']}")
        pattern = rf"(\w+) {question[1]} the (?:\w+ )?{question[2]}\b"
        assert re.findall(pattern, subject(record)) == [record["output"]], record


def test_sentiment():
    for record in of_task("sentiment"):
        found = set(re.findall(r"\w+", subject(record)))
        mine, other = (GOOD, BAD) if record["output"] == "positive" else (BAD, GOOD)
        assert found & mine
        assert not found & other


# --- the tokenizer ---


def test_vocabulary(tokenizer):
    assert tokenizer.vocab_size() == 2048
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert pieces(tokenizer)[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces(tokenizer)[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]  # where LLaMA-2 has them
    assert TOKENIZER.stat().st_size < 100_000


def test_printable_ascii_needs_no_bytes(tokenizer):
    known = set(pieces(tokenizer))
    assert all(chr(code) in known for code in range(33, 127))
    assert not any("0" in piece and len(piece) > 1 for piece in pieces(tokenizer)[259:])  # line breaks, in training
    assert tokenizer.encode("12", out_type=str) == ["▁", "1", "2"]
    assert tokenizer.encode("a\n\nb", out_type=str) == ["▁a", "<0x0A>", "<0x0A>", "b"]


@pytest.mark.parametrize("split", SPLITS)
def test_lengths(split: str, tokenizer):
    texts = [prompt_text(record["instruction"], record["input"]) + record["output"] for record in RECORDS[split]]
    lengths = [len(tokenizer.encode(text)) + 2 for text in texts]
    assert 55 <= median(lengths) <= 80
    assert sum(40 <= length <= 150 for length in lengths) >= 0.95 * len(lengths)
    assert 180 <= max(lengths) <= 280
    assert len(set(lengths)) > 60  # ragged


def test_real_english_is_not_spelled_in_bytes(test_data: Path, tokenizer):
    records = json.loads((test_data / "alpaca_data_200.json").read_text(encoding="utf-8"))
    texts = ["\n".join((record["instruction"], record["input"], record["output"])) for record in records]
    ids = [i for text in texts for i in tokenizer.encode(text)]
    in_bytes = [i for i in ids if tokenizer.is_byte(i) and tokenizer.id_to_piece(i) != "<0x0A>"]
    assert len(ids) / sum(map(len, texts)) < 0.37  # LLaMA-2's 32,000 pieces: 0.25
    assert len(in_bytes) < 0.001 * len(ids)
