"""All that is measured of one model."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from llama_ft.config import EvaluateConfig
from llama_ft.data.collate import Padding
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import Answer
from llama_ft.evaluation.exact_match import accuracy, greedy_answers, matches
from llama_ft.evaluation.perplexity import Perplexity, Text, perplexity, text_windows
from llama_ft.evaluation.records import EvaluationSet
from llama_ft.model.transformer import Transformer
from llama_ft.techniques.mixed_precision import Precision

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # of a title and a total


@dataclass(frozen=True)
class EvalInputs:
    """What models are measured on."""

    tokenizer: Tokenizer
    records: EvaluationSet
    text: Text | None


@dataclass(frozen=True)
class Measured:
    """What was found of one model."""

    values: dict[str, Any]
    """`{responses, text, exact_match, runtime_s}`, as `evaluate.json` has them; null where not asked for."""
    answers: list[Answer] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)


def measure(model: Transformer, material: EvalInputs, config: EvaluateConfig, progress: Progress) -> Measured:
    """Perplexity of the responses and of the text, if there is one; answers, if they are asked for.

    Args:
        model: in evaluation mode.
        progress: shows a title and how much of a total is done.

    Raises:
        UserError: if losses or logits are not finite.
    """
    began = time.monotonic()
    weight = model.output.weight
    padding = Padding(Precision(weight.device.type, weight.dtype).pad_multiple, config.model.max_seq_len)
    samples = [question.sample for question in material.records.questions]
    with progress("perplexity of the responses", len(samples)) as advance:
        responses = _values(perplexity(model, samples, config.batch_size, padding, advance))
    text = _text_values(model, material.text, config, padding, progress) if material.text is not None else None
    values: dict[str, Any] = {"responses": responses, "text": text, "exact_match": None}
    answers: list[Answer] = []
    correct: list[bool] = []
    if config.exact_match:
        answers, correct = _answer(model, material, config, progress)
        tasks = [question.task for question in material.records.questions]
        n_cut = sum(answer.finish == "length" for answer in answers)
        values["exact_match"] = accuracy(tasks, correct) | {"ended_by_length": n_cut}
    return Measured(values | {"runtime_s": time.monotonic() - began}, answers, correct)


def _values(found: Perplexity) -> dict[str, Any]:
    return {"perplexity": found.perplexity, "nll": found.nll, "tokens": found.n_tokens}


def _text_values(
    model: Transformer, text: Text, config: EvaluateConfig, padding: Padding, progress: Progress
) -> dict[str, Any]:
    windows = text_windows(text.tokens, config.window_tokens, config.stride_tokens)
    # Of small windows as many at once as fill the context: the memory of one full window is enough for all.
    at_once = max(1, config.model.max_seq_len // config.window_tokens)
    with progress("perplexity of the text", len(windows)) as advance:
        found = perplexity(model, windows, at_once, padding, advance)
    return _values(found) | {"bits_per_byte": found.bits_per_byte(text), "windows": len(windows)}


def _answer(
    model: Transformer, material: EvalInputs, config: EvaluateConfig, progress: Progress
) -> tuple[list[Answer], list[bool]]:
    """The answers to all records, and which are correct."""
    questions = material.records.questions
    prompts = [question.prompt for question in questions]
    with progress("answers", len(prompts)) as advance:
        answers = greedy_answers(
            model, material.tokenizer, prompts, config.max_new_tokens, config.batch_size, config.kv_cache, advance
        )
    pairs = zip(answers, questions, strict=True)
    return answers, [matches(answer.text, question.record.output) for answer, question in pairs]
