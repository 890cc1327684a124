"""Tasks about sentences and short texts."""

from random import Random

from llama_ft.data.sample import words
from llama_ft.data.sample.task import Example, Task, distinct

# A text has as many sentences as one of these, drawn at random: most are short, a few are long enough that
# a batch of them needs much padding.
_TEXT_LENGTHS = (1, 1, 2, 2, 2, 3, 3, 4, 5, 10)


def sentence(rng: Random, name: str, action: str, thing: str) -> str:
    """A sentence in which someone does something with a thing, mostly somewhere."""
    adjective = f"{rng.choice(words.ADJECTIVES)} " if rng.random() < 0.35 else ""
    where = f" {rng.choice(['by', 'near', 'behind', 'beside'])} the {rng.choice(words.PLACES)}"
    return f"{name} {action} the {adjective}{thing}{where if rng.random() < 0.65 else ''}."


def _any_sentence(rng: Random) -> str:
    subject = rng.choice(words.NAMES if rng.random() < 0.6 else words.SUBJECTS)
    text = sentence(rng, subject, rng.choice(words.ACTIONS), rng.choice(words.OBJECTS))
    if rng.random() < 0.4:
        return f"{rng.choice(words.OPENERS)} {text}"
    return text[0].upper() + text[1:]


def _first_word(rng: Random) -> list[Example]:
    def draw(_: int) -> Example:
        text = _any_sentence(rng)
        return Example(text, {"sentence": text}, text.split()[0])

    return distinct(draw)


def _last_word(rng: Random) -> list[Example]:
    def draw(_: int) -> Example:
        text = _any_sentence(rng)
        return Example(text, {"sentence": text}, text.rstrip(".").split()[-1])

    return distinct(draw)


def _count_words(rng: Random) -> list[Example]:
    def draw(count: int) -> Example:
        wanted = 4 + count % 6
        while len((text := _any_sentence(rng)).split()) != wanted:
            pass
        return Example(text, {"sentence": text}, str(wanted))

    return distinct(draw)


def _scene(rng: Random, count: int) -> list[tuple[str, str, str]]:
    """`count` times (name, action, thing), no name and no thing twice."""
    names, things = rng.sample(words.NAMES, count), rng.sample(words.OBJECTS, count)
    return [(name, rng.choice(words.ACTIONS), thing) for name, thing in zip(names, things, strict=True)]


def _find_colour(rng: Random) -> list[Example]:
    def draw(count: int) -> Example:
        colour = words.COLOURS[count % len(words.COLOURS)]
        scene = _scene(rng, rng.choice(_TEXT_LENGTHS))
        coloured = rng.randrange(len(scene))
        text = " ".join(
            sentence(rng, name, action, f"{colour} {thing}" if i == coloured else thing)
            for i, (name, action, thing) in enumerate(scene)
        )
        return Example(text, {"text": text}, colour)

    return distinct(draw)


def _who(rng: Random) -> list[Example]:
    def draw(_: int) -> Example:
        scene = _scene(rng, 1 + rng.choice(_TEXT_LENGTHS))
        text = " ".join(sentence(rng, *happening) for happening in scene)
        name, action, thing = rng.choice(scene)
        return Example(text, {"text": text, "question": f"Who {action} the {thing}?"}, name)

    return distinct(draw)


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


def _sentiment(rng: Random) -> list[Example]:
    def draw(count: int) -> Example:
        mood = ("positive", "negative")[count % 2]
        adjectives, remarks = _OPINIONS[mood]
        first, second = rng.sample(adjectives, 2)
        opinion = rng.choice([first, f"really {first}", f"{first} and {second}", f"simply {first}"])
        opening = f"{rng.choice(['The', 'Our', 'My', 'This'])} {rng.choice(_REVIEWED)} was {opinion}."
        text = " ".join([opening, *rng.sample(remarks, rng.choice([0, 0, 1, 1, 2, 4]))])
        return Example(text, {"text": text}, mood)

    return distinct(draw)


_READ = "Read the text below with care. Then answer the question about it with one word and nothing else."
TASKS = [
    Task(
        "first_word",
        (
            ("Write the first word of the sentence.", "{sentence}"),
            ("With which word does this sentence begin?", "{sentence}"),
            ('What is the first word of this sentence: "{sentence}"', ""),
        ),
        _first_word,
    ),
    Task(
        "last_word",
        (
            ("Write the last word of the sentence.", "{sentence}"),
            ("With which word does this sentence end?", "{sentence}"),
            ('What is the last word of this sentence: "{sentence}"', ""),
        ),
        _last_word,
    ),
    Task(
        "count_words",
        (
            ("Count the words in the sentence.", "{sentence}"),
            ("How many words does this sentence have?", "{sentence}"),
            ('How many words are there in this sentence: "{sentence}"', ""),
        ),
        _count_words,
    ),
    Task(
        "find_colour",
        (
            ("Which colour is named in the text?", "{text}"),
            ("Find the colour.", "{text}"),
            (_READ, "{text}\nWhich colour is named?"),
        ),
        _find_colour,
    ),
    Task(
        "who",
        (
            ("{question}", "{text}"),
            ("Answer the question with one name.", "{text}\n\n{question}"),
            (_READ, "Text: {text}\nQuestion: {question}"),
        ),
        _who,
    ),
    Task(
        "sentiment",
        (
            ("Is this review positive or negative?", "{text}"),
            ("Say whether the writer is happy (positive) or unhappy (negative).", "{text}"),
            ("Classify the sentiment of the text as positive or negative.", "{text}"),
            ('A customer wrote: "{text}" Is that positive or negative?', ""),
        ),
        _sentiment,
    ),
]
