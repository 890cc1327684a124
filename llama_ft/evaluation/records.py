"""The records that a model is evaluated on, with their tasks, and the majority baseline."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from llama_ft.config import DataConfig, EvaluateConfig, UserError
from llama_ft.data.dataset import SAMPLE_DIR, Record, Sample, encode_record, read_records, records_file
from llama_ft.data.prompt import prompt_text
from llama_ft.data.tokenizer import Tokenizer

HELD_OUT = SAMPLE_DIR / "heldout.jsonl"
NO_TASK = "no task"  # of records that name none


@dataclass(frozen=True, kw_only=True)
class EvalRecord(Record):
    """A record to be answered, with its task."""

    sample: Sample  # cut to the longest length allowed

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return prompt_text(self.instruction, self.input)


@dataclass(frozen=True)
class EvaluationSet:
    """What a model is asked, and what one would answer that knew only the task."""

    file: Path
    records: list[EvalRecord]
    n_skipped: int  # bad records left out, where `data.on_bad_record=skip`
    n_truncated: int  # whose answer was cut at the longest length allowed
    n_dropped: int  # whose prompt left no room for an answer
    majority: dict[str, str]  # by task, the most frequent answer
    is_held_out: bool  # whether they are the built-in ones that training never sees; the majority is then training's


def load_records(config: EvaluateConfig, tokenizer: Tokenizer, log: Callable[[str], None]) -> EvaluationSet:
    """Read the records that `data` names; of the built-in set those that are held out from training.

    A file or record that is bad or cannot be had is a UserError, and so is it if none is left.
    """
    builtin = config.data.path is None and config.data.url is None
    file = HELD_OUT if builtin else records_file(config.data, log)
    read, n_skipped = _read(file, config.data)
    read = read[: config.max_samples]
    records, n_truncated = [], 0
    for record in read:
        whole = encode_record(record, tokenizer)
        sample = Sample(whole.tokens[: config.max_length], whole.n_prompt)
        eval_record = EvalRecord(**vars(record), sample=sample)
        if sample.n_targets > 0 and len(tokenizer.encode(eval_record.prompt, bos=True)) < config.model.max_seq_len:
            records.append(eval_record)
            n_truncated += len(sample) < len(whole)
    if not records:
        reason = "no prompt leaves room for an answer" if read else "there are no records"
        raise UserError(f"{file}: {reason}")
    known = [(record.task, record.output) for record in records]
    if builtin:
        train, _ = _read(SAMPLE_DIR / "train.jsonl", replace(config.data, first=None))
        known = [(record.task, record.output) for record in train]
    n_dropped = len(read) - len(records)
    return EvaluationSet(file, records, n_skipped, n_truncated, n_dropped, majority_answers(known), builtin)


def majority_answers(answers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """From (task, answer) the most frequent answer of each task; of equally frequent ones the first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for task, answer in answers:
        counts[task][answer.strip()] += 1
    return {task: counter.most_common(1)[0][0] for task, counter in counts.items()}


def _read(file: Path, config: DataConfig) -> tuple[list[Record], int]:
    """The records, each with a task, and how many bad ones were skipped."""
    records, n_skipped = read_records(file, config.on_bad_record, config.first)
    return [replace(record, task=record.task or NO_TASK) for record in records], n_skipped
