"""Tasks about numbers and the calendar."""

from random import Random

from dev import words
from dev.task import Example, Task, distinct


def _add(rng: Random) -> list[Example]:
    def draw(_: int) -> Example:
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        # 3 + 4 and 4 + 3 are the same question.
        return Example(f"{min(a, b)} {max(a, b)}", {"a": str(a), "b": str(b)}, str(a + b))

    return distinct(draw)


def _sort_numbers(rng: Random) -> list[Example]:
    def draw(_: int) -> Example:
        numbers = rng.sample(range(1, 13), 3)
        text = ", ".join(map(str, numbers))
        return Example(text, {"numbers": text}, ", ".join(map(str, sorted(numbers))))

    return distinct(draw)


def _larger_number(rng: Random) -> list[Example]:
    def draw(count: int) -> Example:
        small, large = sorted(rng.sample(range(10, 100), 2))
        a, b = (small, large) if count % 2 else (large, small)
        return Example(f"{small} {large}", {"a": str(a), "b": str(b)}, str(large))

    return distinct(draw)


def number_in_words(number: int) -> str:
    """English words for 1 to 199, such as "one hundred and forty-two"."""
    if number >= 100:
        rest = f" and {number_in_words(number - 100)}" if number > 100 else ""
        return "one hundred" + rest
    if number < 20:
        return words.ONES[number]
    tens, ones = divmod(number, 10)
    return words.TENS[tens - 2] + (f"-{words.ONES[ones]}" if ones else "")


def _number_in_words(rng: Random) -> list[Example]:
    numbers = rng.sample(range(1, 200), 199)
    return [Example(str(n), {"number": str(n)}, number_in_words(n)) for n in numbers]


def _calendar(_: Random) -> list[Example]:
    examples = []
    for kind, names in (("day", words.DAYS), ("month", words.MONTHS)):
        for name, following in zip(names, names[1:] + names[:1], strict=True):
            for place, given, answer in (("after", name, following), ("before", following, name)):
                values = {"kind": kind, "place": place, "name": given}
                examples.append(Example(f"{place} {given}", values, answer))
    return examples


TASKS = [
    Task(
        "add",
        (
            ("Add the two numbers.", "{a}, {b}"),
            ("What is {a} plus {b}?", ""),
            ("Work out the sum.", "{a} + {b}"),
            ("I have {a} apples and my sister gives me {b} more. How many apples do I have now?", ""),
        ),
        _add,
    ),
    Task(
        "sort_numbers",
        (
            ("Sort the numbers from the smallest to the largest.", "{numbers}"),
            ("Put these numbers in ascending order.", "{numbers}"),
            ("Write the numbers {numbers} in order, beginning with the smallest one.", ""),
        ),
        _sort_numbers,
    ),
    Task(
        "larger_number",
        (
            ("Which of the two numbers is larger?", "{a}, {b}"),
            ("Which number is greater, {a} or {b}?", ""),
            ("Pick the bigger number.", "{a} and {b}"),
            ("One box weighs {a} kilograms and another weighs {b} kilograms. How heavy is the heavier box?", ""),
        ),
        _larger_number,
    ),
    Task(
        "number_in_words",
        (
            ("Write the number in words.", "{number}"),
            ("How do you say {number} in English words?", ""),
            ("Spell out this number as you would on a cheque.", "{number}"),
        ),
        _number_in_words,
    ),
    Task(
        "calendar",
        (
            ("Which {kind} comes right {place} {name}?", ""),
            ("Name the {kind} {place} the one given.", "{name}"),
            ("What {kind} comes {place} this one?", "{name}"),
            ("My calendar shows {name}. Tell me the {kind} just {place} it.", ""),
        ),
        _calendar,
        closed=True,
    ),
]
