"""Generates simple English sentences from word lists, to train the tokenizer on."""

import re
from collections.abc import Callable, Iterator
from random import Random

from dev import vocabulary, words

_SENTENCES = """
The {q} {n} of the {n} is {q}, and the {n} is {q}.
{Name} {past} the {n} in the {n}, but {name} did not {v} it at all.
What is the {n} of a {q} {n}, and how does it {v} the {n}?
How can we {v} the {a} of our {ns}?
Explain how {ns} {v} and why they are {q} for {a}.
Write a {q} {n} about a {n} who has to {v} a {n}.
Create a list of {number} {q} {ns} that can {v} {a}.
Describe the {a} between {ns} and {ns}.
Give me an example of a {n} that is {m} {q}.
Name {number} ways to {v} your {n} and {v} your {a}.
I have been {ing} {ns} for {number} years, and I {m} {v} them.
It is {q} to {v} a {n} because it will {v} the {a} of the {n}.
{A} is the {a} of {ing}, {ing} and {ing} {ns}.
She was {ing} {m} when her {n} {past} the {q} {n}.
They would have {done} it if the {n} had not been so {q}.
There are {number} {ns} in this {n}, and each of them was {done} by a {q} {n}.
You should {m} {v} the {n} before you {v} it with your {n}.
When the {n} was {q}, we {past} from the {n} to the {n}.
He said that {a} and {a} were more {q} than {a}.
This {n} {vs} {a}, which {vs} the {n} and the {q} {ns}.
Their {n} {past} that the {a} could not {v} without {a}.
{M}, the {ns} are {q}, {q} and {q}; they also {v} {a}.
If you {v} the {q} {n}, you will {v} a {n} or {v} another {n}.
The {a} of {a} has {done} the {n} over the past {number} {ns}.
Please {v} the following {n} and {v} the {q} {a}.
Our {n} {vs} {ns} {m}; these {ns} {v} {a} at a {q} {a}.
Who {past} the {n} from {Name}'s {n}, and where is it now?
I don't {v} {a}, and I can't {v} the {n} that you {past}.
Some {ns} {v} {m}, while others are {q} after {ing} {a}.
Overall, {a} is a {q} part of any {n}, and by {ing} it one can {v} both {a} and {a}.
""".strip().splitlines()


def _ing(verb: str) -> str:
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "be")):
        return verb[:-1] + "ing"
    doubled = {"get", "put", "let", "run", "sit", "set", "stop", "win", "cut", "hit", "plan", "drop", "begin"}
    return verb + (verb[-1] if verb in doubled else "") + "ing"


def _past(verb: str) -> str:
    if verb in words.PASTS or verb in vocabulary.OTHER_PASTS:
        return words.PASTS.get(verb) or vocabulary.OTHER_PASTS[verb]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def _with_s(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _plural(noun: str) -> str:
    return noun if noun in vocabulary.UNCOUNTED else words.PLURALS.get(noun) or _with_s(noun)


def _third_person(verb: str) -> str:
    return {"have": "has", "do": "does", "go": "goes"}.get(verb) or _with_s(verb)


def _with_articles(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeio]|u(?!ni|s[eu]))", r"\1n ", text)


def _picker(pool: list[str], rng: Random) -> Callable[[], str]:
    # The lists begin with the most common words; like English, weights fall with the rank.
    weights = [1 / (rank + 20) for rank in range(len(pool))]
    return lambda: rng.choices(pool, weights)[0]


def sentences(rng: Random, count: int) -> Iterator[str]:
    """`count` sentences of common words, grammatical but mostly meaningless."""
    thing, idea = _picker(vocabulary.THINGS, rng), _picker(vocabulary.ABSTRACT, rng)
    doing, quality = _picker(vocabulary.DOINGS, rng), _picker(vocabulary.QUALITIES, rng)
    manner = _picker(vocabulary.MANNERS, rng)
    fill: dict[str, Callable[[], str]] = {
        "n": thing,
        "ns": lambda: _plural(thing()),
        "a": idea,
        "A": lambda: idea().capitalize(),
        "v": doing,
        "vs": lambda: _third_person(doing()),
        "past": lambda: _past(doing()),
        "done": _picker(vocabulary.PARTICIPLES, rng),
        "ing": lambda: _ing(doing()),
        "q": quality,
        "m": manner,
        "M": lambda: manner().capitalize(),
        "name": lambda: rng.choice(["he", "she", "they", "we", "I", "you", "it"]),
        "Name": lambda: rng.choice(words.NAMES),
        "number": lambda: rng.choice([str(rng.randint(2, 99)), words.ONES[rng.randint(2, 12)]]),
    }
    for _ in range(count):
        # Split at the braces: every second part names a slot.
        parts = rng.choice(_SENTENCES).replace("}", "{").split("{")
        yield _with_articles("".join(fill[part]() if i % 2 else part for i, part in enumerate(parts)))
