"""Tasks about single words: their meaning, their forms, their letters."""

from random import Random

from dev import words
from dev.task import Example, Task, distinct


def _from_table(table: dict[str, str], rng: Random) -> list[Example]:
    examples = [Example(word, {"word": word}, answer) for word, answer in table.items()]
    rng.shuffle(examples)
    return examples


def _uppercase(rng: Random) -> list[Example]:
    return _from_table({word: word.upper() for word in words.SHORT_WORDS}, rng)


def _spell(rng: Random) -> list[Example]:
    return _from_table({word: "-".join(word) for word in words.SHORT_WORDS}, rng)


def _opposite(rng: Random) -> list[Example]:
    # A held-out word's opposite may be a training question: who learned "hot, cold" must reverse it for "cold".
    return _from_table(words.OPPOSITES, rng)


def _category(rng: Random) -> list[Example]:
    return _from_table({word: category for category, group in words.CATEGORIES.items() for word in group}, rng)


def _plural(rng: Random) -> list[Example]:
    return _from_table(words.PLURALS, rng)


def _past_tense(rng: Random) -> list[Example]:
    return _from_table(words.PASTS, rng)


def _contains_letter(rng: Random) -> list[Example]:
    pool = rng.sample(words.SHORT_WORDS, len(words.SHORT_WORDS))

    def draw(count: int) -> Example:
        word, wanted = pool.pop(), count % 2 == 0
        letters = sorted(set(word)) if wanted else sorted(set("aeilnorst") - set(word))
        return Example(word, {"word": word, "letter": rng.choice(letters)}, "yes" if wanted else "no")

    return distinct(draw)


TASKS = [
    Task(
        "uppercase",
        (
            ("Write the word in capital letters.", "{word}"),
            ("Change every letter of this word to upper case.", "{word}"),
            ('Write "{word}" in capital letters.', ""),
            ("A sign has to be read from far away. Write the word below in capital letters for the sign.", "{word}"),
        ),
        _uppercase,
    ),
    Task(
        "spell",
        (
            ("Spell the word with a dash between the letters.", "{word}"),
            ('How is "{word}" spelled? Put a dash between the letters.', ""),
            ("Write the letters of the word one by one, joined by dashes.", "{word}"),
            ("You are helping a child to read. Spell the word letter by letter, with dashes in between.", "{word}"),
        ),
        _spell,
    ),
    Task(
        "opposite",
        (
            ("Give the opposite of the word.", "{word}"),
            ('What is the opposite of "{word}"?', ""),
            ("Which word means the opposite of this one?", "{word}"),
            ("Find an antonym for the word below. Answer with one word.", "{word}"),
        ),
        _opposite,
    ),
    Task(
        "category",
        (
            ("Say which category the word belongs to: " + ", ".join(words.CATEGORIES) + ".", "{word}"),
            ("What kind of thing is this? Answer with one word.", "{word}"),
            ('To which category does "{word}" belong?', ""),
            ("Classify the word.", "{word}"),
        ),
        _category,
    ),
    Task(
        "plural",
        (
            ("Give the plural of the noun.", "{word}"),
            ('What is the plural of "{word}"?', ""),
            ("Write the word as if there were more than one.", "{word}"),
            ('There is one "{word}" here. Which word do we use when there are two of them?', ""),
        ),
        _plural,
    ),
    Task(
        "past_tense",
        (
            ("Put the verb into the past tense.", "{word}"),
            ('What is the past tense of "{word}"?', ""),
            ("Which form of this verb do we use when we talk about yesterday?", "{word}"),
            ("Write the simple past of the verb.", "{word}"),
        ),
        _past_tense,
    ),
    Task(
        "contains_letter",
        (
            ("Does the word contain the letter {letter}? Answer yes or no.", "{word}"),
            ('Does the word "{word}" contain the letter {letter}?', ""),
            ("Look at the word and say yes if it has the letter {letter} in it, or no if it does not.", "{word}"),
        ),
        _contains_letter,
    ),
]
