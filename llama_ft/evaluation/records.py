"""The records that a model is evaluated on, the majority baseline, and the share of correct answers."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llama_ft.config import DataConfig, EvaluateConfig, UserError
from llama_ft.data.dataset import SAMPLE_DIR, Reader, records_file
from llama_ft.data.records import Record, Sample
from llama_ft.data.template import Template, encode_prompt
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.records.evaluation import Accuracy, EvaluatedRecords, Majority, Share
from llama_ft.system import Log

HELD_OUT = SAMPLE_DIR / "heldout.jsonl"
NO_TASK = "no task"  # for records without one


@dataclass(frozen=True)
class EvaluationSet:
    """The records of an evaluation, and the score of a model that knows only the task."""

    about: EvaluatedRecords
    records: list[Record]
    samples: list[Sample]  # the records', cut to the longest length allowed
    written: list[str]  # the records' answers as written by the template, for example after an empty reasoning
    majority: Majority

    def is_correct(self, index: int, answer: str) -> bool:
        """Return True for a record's answer, as in the data or as written by the template."""
        return matches(answer, self.records[index].output) or matches(answer, self.written[index])


def load_records(config: EvaluateConfig, tokenizer: Tokenizer, template: Template, log: Log) -> EvaluationSet:
    """Read the records of `data`, or the built-in held-out ones; a UserError if one is bad, or none is left."""
    builtin = config.data.path is None and config.data.url is None
    file = HELD_OUT if builtin else records_file(config.data, log)
    reader, n_without_room = Reader(file, config.data, log), 0
    records, samples, written = list[Record](), list[Sample](), list[str]()
    for _, record, sample in reader.samples(template, tokenizer, config.max_length, config.max_samples):
        if len(encode_prompt(template.prompt(record), tokenizer)) < config.model.max_seq_len:
            records.append(_with_task(record))
            samples.append(sample)
            written.append(template.answer(record, tokenizer))
        else:
            n_without_room += 1
    if not records:
        raise UserError(f"{file}: no prompt leaves room for an answer")
    about = EvaluatedRecords(
        name=config.data.title,
        file=file.name if builtin else str(file),  # the package's path is not informative
        is_held_out=builtin,
        records=len(records),
        skipped=reader.n_skipped,
        truncated=reader.n_truncated,
        dropped=reader.n_dropped + n_without_room,
    )
    trained = Reader(SAMPLE_DIR / "train.jsonl", DataConfig("sample"))
    known = (_with_task(record) for _, record in trained.records()) if builtin else records
    majority = majority_of(records, known, "training split" if builtin else "same records")
    return EvaluationSet(about, records, samples, written, majority)


def majority_of(records: Sequence[Record], known: Iterable[Record], name: str) -> Majority:
    """The accuracy of each task's most frequent answer in `known`, which is called `name`; the first among ties."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in known:
        counts[record.task][record.output.strip()] += 1
    answers = {task: counter.most_common(1)[0][0] for task, counter in counts.items()}
    correct = [matches(answers.get(record.task, ""), record.output) for record in records]
    share = accuracy([record.task for record in records], correct)
    return Majority(**vars(share), of=name, answers=answers)


def matches(answer: str, expected: str) -> bool:
    """Return True if two texts are equal, ignoring white space around them."""
    return answer.strip() == expected.strip()


def accuracy(tasks: Sequence[str], correct: Sequence[bool]) -> Accuracy:
    """The share of correct answers, in all and by task."""
    by_task: dict[str, list[bool]] = {}
    for task, is_correct in zip(tasks, correct, strict=True):
        by_task.setdefault(task, []).append(is_correct)
    named = {task: Share(*_share(by_task[task])) for task in sorted(by_task)} if by_task.keys() != {NO_TASK} else {}
    return Accuracy(*_share(correct), named)


def _share(correct: Sequence[bool]) -> tuple[int, int, float]:
    return sum(correct), len(correct), sum(correct) / len(correct)


def _with_task(record: Record) -> Record:
    return replace(record, task=record.task or NO_TASK)
