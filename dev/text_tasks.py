"""Tasks about sentences and short texts."""

from collections.abc import Callable
from functools import partial
from random import Random

from dev import words
from dev.task import Example, Task, distinct

# The number of sentences in a text is drawn from these: most texts are short, a few long enough that a batch needs much
# padding.
TEXT_LENGTHS = (1, 1, 2, 2, 2, 3, 3, 4, 5, 10)


def sentence(rng: Random, name: str, action: str, thing: str) -> str:
    """A sentence in which someone does something with a thing, usually at a place."""
    adjective = f"{rng.choice(words.ADJECTIVES)} " if rng.random() < 0.35 else ""
    where = f" {rng.choice(['by', 'near', 'behind', 'beside'])} the {rng.choice(words.PLACES)}"
    return f"{name} {action} the {adjective}{thing}{where if rng.random() < 0.65 else ''}."


def any_sentence(rng: Random) -> str:
    """A sentence of any kind."""
    subject = rng.choice(words.NAMES if rng.random() < 0.6 else words.SUBJECTS)
    text = sentence(rng, subject, rng.choice(words.ACTIONS), rng.choice(words.OBJECTS))
    if rng.random() < 0.4:
        return f"{rng.choice(words.OPENERS)} {text}"
    return text[0].upper() + text[1:]


def first_word(rng: Random, _: int) -> Example:
    """A sentence and its first word."""
    text = any_sentence(rng)
    return Example(text, {"sentence": text}, text.split()[0])


def last_word(rng: Random, _: int) -> Example:
    """A sentence and its last word."""
    text = any_sentence(rng)
    return Example(text, {"sentence": text}, text.rstrip(".").split()[-1])


def count_words(rng: Random, turn: int) -> Example:
    """A sentence and its number of words, which cycles from 4 to 9."""
    wanted = 4 + turn % 6
    while len((text := any_sentence(rng)).split()) != wanted:
        pass
    return Example(text, {"sentence": text}, str(wanted))


def scene(rng: Random, count: int) -> list[tuple[str, str, str]]:
    """`count` times (name, action, thing), without repeated names or things."""
    names, things = rng.sample(words.NAMES, count), rng.sample(words.OBJECTS, count)
    return [(name, rng.choice(words.ACTIONS), thing) for name, thing in zip(names, things, strict=True)]


def find_colour(rng: Random, turn: int) -> Example:
    """A text and the one color in it; the colors alternate."""
    colour = words.COLOURS[turn % len(words.COLOURS)]
    happenings = scene(rng, rng.choice(TEXT_LENGTHS))
    coloured = rng.randrange(len(happenings))
    text = " ".join(
        sentence(rng, name, action, f"{colour} {thing}" if i == coloured else thing)
        for i, (name, action, thing) in enumerate(happenings)
    )
    return Example(text, {"text": text}, colour)


def who(rng: Random, _: int) -> Example:
    """A text, and the person who did one of the things in it."""
    happenings = scene(rng, 1 + rng.choice(TEXT_LENGTHS))
    text = " ".join(sentence(rng, *happening) for happening in happenings)
    name, action, thing = rng.choice(happenings)
    values = {"text": text, "question": f"Who {action} the {thing}?", "action": action, "thing": thing}
    return Example(text, values, name)


_REVIEWED = (
    "film book hotel soup concert phone teacher journey play cake museum song waiter game lesson bread train room party"
).split()
_OPINIONS = {
    "positive": (
        "wonderful great excellent lovely perfect delightful brilliant superb charming pleasant".split(),
        [
            "I would choose it again at once.",
            "I smiled all the way home.",
            "We enjoyed every minute.",
            "It was worth every penny.",
            "My whole family loved it.",
            "I have told all my friends to try it.",
            "It was even better than we had hoped.",
        ],
    ),
    "negative": (
        "terrible awful boring horrible dreadful poor disappointing bad unpleasant annoying".split(),
        [
            "I would never choose it again.",
            "I complained all the way home.",
            "We regretted every minute.",
            "It was a waste of money.",
            "My whole family hated it.",
            "I have told all my friends to avoid it.",
            "It was even worse than we had feared.",
        ],
    ),
}


def sentiment(rng: Random, turn: int) -> Example:
    """A review, alternately positive and negative."""
    mood = ("positive", "negative")[turn % 2]
    adjectives, remarks = _OPINIONS[mood]
    first, second = rng.sample(adjectives, 2)
    opinion = rng.choice([first, f"really {first}", f"{first} and {second}", f"simply {first}"])
    opening = f"{rng.choice(['The', 'Our', 'My', 'This'])} {rng.choice(_REVIEWED)} was {opinion}."
    text = " ".join([opening, *rng.sample(remarks, rng.choice([0, 0, 1, 1, 2, 4]))])
    return Example(text, {"text": text}, mood)


def _all(draw: Callable[[Random, int], Example]) -> Callable[[Random], list[Example]]:
    return lambda rng: distinct(partial(draw, rng))


_READ = "Read the text below with care. Then answer the question about it with one word and nothing else."
TASKS = [
    Task(
        "first_word",
        (
            ("Write the first word of the sentence.", "{sentence}"),
            ("With which word does this sentence begin?", "{sentence}"),
            ('What is the first word of this sentence: "{sentence}"', ""),
        ),
        _all(first_word),
    ),
    Task(
        "last_word",
        (
            ("Write the last word of the sentence.", "{sentence}"),
            ("With which word does this sentence end?", "{sentence}"),
            ('What is the last word of this sentence: "{sentence}"', ""),
        ),
        _all(last_word),
    ),
    Task(
        "count_words",
        (
            ("Count the words in the sentence.", "{sentence}"),
            ("How many words does this sentence have?", "{sentence}"),
            ('How many words are there in this sentence: "{sentence}"', ""),
        ),
        _all(count_words),
    ),
    Task(
        "find_colour",
        (
            ("Which colour is named in the text?", "{text}"),
            ("Find the colour.", "{text}"),
            (_READ, "{text}\nWhich colour is named?"),
        ),
        _all(find_colour),
    ),
    Task(
        "who",
        (
            ("{question}", "{text}"),
            ("Answer the question with one name.", "{text}\n\n{question}"),
            (_READ, "Text: {text}\nQuestion: {question}"),
        ),
        _all(who),
    ),
    Task(
        "sentiment",
        (
            ("Is this review positive or negative?", "{text}"),
            ("Say whether the writer is happy (positive) or unhappy (negative).", "{text}"),
            ("Classify the sentiment of the text as positive or negative.", "{text}"),
            ('A customer wrote: "{text}" Is that positive or negative?', ""),
        ),
        _all(sentiment),
    ),
]
