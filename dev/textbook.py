"""Generates the built-in model's pretraining text: an endless primary-school textbook in our own words.

It has facts and skills in plain sentences ("The plural of fox is foxes.") and in exercises with solutions, in wordings
and layouts (`textbook.yaml`) that differ from those of the sample tasks. Tables of facts, such as plurals and sums, are
complete, as in any large text. No exercise uses a text, review or numbers of a held-out question unchanged; parts of
them occur in longer ones.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, cast

from omegaconf import OmegaConf

from dev import text_tasks, words
from dev.corpus import sentences
from dev.number_tasks import number_in_words
from dev.prose import PARAGRAPHS
from dev.task import Example
from llama_ft.data.dataset import SAMPLE_DIR

Values = dict[str, str]

OPEN, CLOSE = "\x02", "\x03"  # around an answer; texts do not contain them
STATEMENTS = 0.25  # share of plain statements; the rest are exercises
N_SHORT = 5  # the first layouts are the short ones
# The texts and numbers of these topics are drawn at random, so that a held-out question's can be left out.
_DRAWN = ("sort_numbers", "first_word", "last_word", "count_words", "find_colour", "who", "sentiment")
# Long texts would fill the book.
_WEIGHTS = {"find_colour": 0.4, "who": 0.7, "sentiment": 0.3, "first_word": 0.7, "last_word": 0.7, "copy": 3.0}
_WORDS = [*words.SHORT_WORDS, *words.OPPOSITES, *words.PLURALS, *words.PASTS, *words.NAMES, *words.OBJECTS]


def _word(answers: dict[str, str]) -> Callable[[Random], Values]:
    pairs = list(answers.items())

    def draw(rng: Random) -> Values:
        word, answer = rng.choice(pairs)
        return {"item": word, "answer": answer}

    return draw


def _contains(rng: Random) -> Values:
    word = rng.choice(words.SHORT_WORDS)
    wanted = rng.random() < 0.5
    letters = sorted(set(word)) if wanted else sorted(set("aeilnorst") - set(word))
    return {
        "item": word,
        "letter": rng.choice(letters),
        "answer": "yes" if wanted else "no",
        "is": "is" if wanted else "is not",
        "spelled": "-".join(word),
    }


def _sum(rng: Random) -> Values:
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    return {
        "item": rng.choice([f"{a}, {b}", f"{a} + {b}", f"{a} and {b}"]),
        "a": f"{a}",
        "b": f"{b}",
        "answer": f"{a + b}",
    }


def _sorted(rng: Random) -> Values:
    numbers = rng.sample(range(1, 13), 3)
    return {"item": ", ".join(map(str, numbers)), "answer": ", ".join(map(str, sorted(numbers)))}


def _larger(rng: Random) -> Values:
    a, b = rng.sample(range(10, 100), 2)
    return {
        "item": rng.choice([f"{a}, {b}", f"{a} and {b}"]),
        "a": f"{a}",
        "b": f"{b}",
        "answer": f"{max(a, b)}",
        "less": f"{min(a, b)}",
    }


def _number(rng: Random) -> Values:
    number = rng.randint(1, 199)
    return {"item": f"{number}", "answer": number_in_words(number)}


def _calendar(rng: Random) -> Values:
    kind, names = rng.choice([("day", words.DAYS), ("month", words.MONTHS)])
    place = rng.randrange(len(names))
    name, following = names[place - 1], names[place]
    if rng.random() < 0.5:
        return {"item": name, "answer": following, "kind": kind, "side": "after"}
    return {"item": following, "answer": name, "kind": kind, "side": "before"}


def _example(examples: Callable[[Random, int], Example], key: str) -> Callable[[Random], Values]:
    def draw(rng: Random) -> Values:
        example = examples(rng, rng.randrange(60))
        return {**example.values, "item": example.values[key], "answer": example.output}

    return draw


def _copy(rng: Random) -> Values:
    kind = rng.random()
    if kind < 0.4:
        text = text_tasks.any_sentence(rng)
    elif kind < 0.8:
        text = " ".join(rng.choices(_WORDS, k=rng.randint(1, 8)))
    else:
        text = ", ".join(str(rng.randint(1, 199)) for _ in range(rng.randint(1, 6)))
    return {"item": text, "answer": text}


# Each draws an exercise's values: `item`, the right `answer`, and anything else that the wordings name.
# `copy` is not a task: a model that can copy learns the rest much sooner.
TOPICS: dict[str, Callable[[Random], Values]] = {
    "uppercase": _word({word: word.upper() for word in words.SHORT_WORDS}),
    "spell": _word({word: "-".join(word) for word in words.SHORT_WORDS}),
    "opposite": _word(words.OPPOSITES),
    "category": _word({word: name for name, group in words.CATEGORIES.items() for word in group}),
    "plural": _word(words.PLURALS),
    "past_tense": _word(words.PASTS),
    "contains_letter": _contains,
    "add": _sum,
    "sort_numbers": _sorted,
    "larger_number": _larger,
    "number_in_words": _number,
    "calendar": _calendar,
    "first_word": _example(text_tasks.first_word, "sentence"),
    "last_word": _example(text_tasks.last_word, "sentence"),
    "count_words": _example(text_tasks.count_words, "sentence"),
    "find_colour": _example(text_tasks.find_colour, "text"),
    "who": _example(text_tasks.who, "text"),
    "sentiment": _example(text_tasks.sentiment, "text"),
    "copy": _copy,
}


@cache
def wordings() -> dict[str, Any]:
    """The templates: `layouts`, `closings`, and `statements`, `headings` and `questions` for each of the `topics`."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(Path(__file__).with_suffix(".yaml"))))


@cache
def _heldout() -> tuple[str, frozenset[str]]:
    """The texts of the held-out questions, and the pairs of numbers that they compare."""
    file = SAMPLE_DIR / "heldout.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [(record["task"], f"{record['instruction']}\n{record['input']}") for record in records]
    pairs = [re.findall(r"\d+", text) for task, text in texts if task == "larger_number"]
    return "\n".join(text for _, text in texts), frozenset(" ".join(sorted(pair)) for pair in pairs)


def _is_heldout(name: str, values: Values) -> bool:
    """Return True if a held-out question has these values; tables of facts are never left out."""
    texts, pairs = _heldout()
    if name == "larger_number":
        return " ".join(sorted((values["a"], values["b"]))) in pairs
    return name in _DRAWN and values["item"] in texts


def _fill(template: str, values: Values) -> str:
    """Fill a template; the answer is marked if it can be known from the text before it."""
    if -1 < template.find("{item}") < template.find("{answer}") or "{item}" not in template:
        values = values | {"answer": f"{OPEN}{values['answer']}{CLOSE}"}
    return template.format_map(values)


def lesson(name: str, rng: Random, layouts: Sequence[str]) -> str:
    """A statement, or an exercise with its solution in one of the layouts, with the answer between OPEN and CLOSE."""
    topic = wordings()["topics"][name]
    while _is_heldout(name, values := TOPICS[name](rng)):
        pass
    if rng.random() < STATEMENTS:
        return _fill(rng.choice(topic["statements"]), values) + rng.choice("\n ")
    heading, question = (rng.choice(topic[kind]).format_map(values) for kind in ("headings", "questions"))
    return _fill(rng.choice(layouts), values | {"heading": heading, "question": question})


def lessons(rng: Random, is_short: bool) -> Iterator[str]:
    """Endless single lessons, with all topics equally likely; short ones use only the short layouts."""
    layouts = wordings()["layouts"][: N_SHORT if is_short else None]
    while True:
        yield lesson(rng.choice(list(TOPICS)), rng, layouts)


def pages(rng: Random) -> Iterator[str]:
    """Endless pages of several lessons, and occasionally of other text."""
    names, weights = list(TOPICS), [_WEIGHTS.get(name, 1.0) for name in TOPICS]
    prose = sentences(rng, 10**9)
    while True:
        kind = rng.random()
        if kind < 0.05:
            yield " ".join(next(prose) for _ in range(rng.randint(1, 4)))
        elif kind < 0.08:
            yield rng.choice(PARAGRAPHS)
        else:
            # Like a textbook's, a page often stays with one or two topics.
            chosen = rng.choices(names, weights, k=rng.choice([1, 2, 3, 8]))
            parts = [lesson(rng.choice(chosen), rng, wordings()["layouts"]) for _ in range(rng.randint(2, 8))]
            yield rng.choice(["", "\n"]).join(parts) + rng.choice(wordings()["closings"])
