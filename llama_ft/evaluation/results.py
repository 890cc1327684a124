"""What an evaluation leaves behind: `evaluate.json` and `answers.jsonl`."""

import enum
from collections.abc import Sequence
from dataclasses import asdict

from llama_ft.config import EvaluateConfig
from llama_ft.config.checks import Settings
from llama_ft.evaluation.exact_match import accuracy, matches
from llama_ft.evaluation.measures import EvalInputs, Measured
from llama_ft.records.answers import AnsweredRecord
from llama_ft.records.evaluation import EvaluatedRecords, EvaluatedText, Evaluation, Majority


def evaluation(
    config: EvaluateConfig,
    inputs: EvalInputs,
    measured: Sequence[Measured],
    device: str,
    dtype: str,
    versions: dict[str, str | None],
    command: str,
) -> Evaluation:
    """The record of an evaluation."""
    data, text = inputs.data, inputs.text
    return Evaluation(
        model=config.model.name,
        data=EvaluatedRecords(
            name=data.file.name if config.data.path else config.data.name,
            file=data.file.name if data.is_held_out else str(data.file),  # the package's place says nothing
            is_held_out=data.is_held_out,
            records=len(data.records),
            skipped=data.n_skipped,
            truncated=data.n_truncated,
            dropped=data.n_dropped,
        ),
        text=None
        if text is None
        else EvaluatedText(
            str(text.file), text.n_bytes, len(text.tokens) - 1, config.window_tokens, config.stride_tokens
        ),
        max_new_tokens=config.max_new_tokens,
        models=[found.model for found in measured],
        majority=_majority(inputs) if config.exact_match else None,
        settings=asdict(config, dict_factory=_plain),
        device=device,
        dtype=dtype,
        versions=versions,
        command=command,
    )


def answered_records(inputs: EvalInputs, measured: Sequence[Measured]) -> list[AnsweredRecord]:
    """Each record with the answers to it, as they came, and whether they are correct."""
    return [
        AnsweredRecord(
            record.instruction,
            record.input,
            record.task,
            record.output,
            {found.model.role: (found.answers[index].text, found.correct[index]) for found in measured},
        )
        for index, record in enumerate(inputs.data.records)
    ]


def _majority(inputs: EvalInputs) -> Majority:
    """How far the most frequent answer of each task goes."""
    data = inputs.data
    correct = [matches(data.majority.get(record.task, ""), record.output) for record in data.records]
    share = accuracy([record.task for record in data.records], correct)
    of = "training split" if data.is_held_out else "same records"
    return Majority(**vars(share), of=of, answers=data.majority)


def _plain(items: list[tuple[str, object]]) -> Settings:
    return {key: value.name if isinstance(value, enum.Enum) else value for key, value in items}
