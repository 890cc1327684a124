"""Tasks, and the split of their questions into training and held-out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

TRAIN_PER_TASK = 90
HELDOUT_PER_TASK = 18
POOL = TRAIN_PER_TASK + HELDOUT_PER_TASK

Record = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A question without its wording. Two examples with the same subject are the same question."""

    subject: str
    values: Mapping[str, str]
    output: str


@dataclass(frozen=True)
class Task:
    """A kind of question: its wordings, as (instruction, input) templates, and its examples."""

    name: str
    wordings: tuple[tuple[str, str], ...]
    examples: Callable[[Random], list[Example]]
    closed: bool = False

    def split(self, rng: Random) -> tuple[list[Record], list[Record]]:
        """The task's records: (training, held-out).

        No subject is in both, so a held-out word, number or sentence is new to a model that saw only the training
        records. A closed task has too few subjects for that (there are only seven days): there, only the combination of
        wording and subject is new.
        """
        examples = self.examples(rng)
        if self.closed:
            asked = [(example, wording) for example in examples for wording in self.wordings]
            rng.shuffle(asked)
        else:
            asked = [(example, rng.choice(self.wordings)) for example in examples]
        if len(asked) < POOL:
            raise ValueError(f"task {self.name}: {len(asked)} questions, {POOL} are needed")
        records = [self._record(example, wording) for example, wording in asked[:POOL]]
        return records[HELDOUT_PER_TASK:], records[:HELDOUT_PER_TASK]

    def _record(self, example: Example, wording: tuple[str, str]) -> Record:
        instruction, input = (template.format(**example.values) for template in wording)
        return {"instruction": instruction, "input": input, "output": example.output, "task": self.name}


def distinct(draw: Callable[[int], Example]) -> list[Example]:
    """As many examples as a task needs, without repeated subjects.

    `draw` is called with the number of examples so far, so that it can alternate between answers.
    """
    examples: dict[str, Example] = {}
    while len(examples) < POOL:
        example = draw(len(examples))
        examples.setdefault(example.subject, example)
    return list(examples.values())
