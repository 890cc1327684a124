"""All that is measured of one model."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from llama_ft.config import EvaluateConfig
from llama_ft.data.collate import Padding
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.evaluation.exact_match import accuracy, greedy_answers, matches
from llama_ft.evaluation.perplexity import Text, bits_per_byte, perplexity, text_windows
from llama_ft.evaluation.records import EvaluationSet
from llama_ft.model.transformer import Transformer
from llama_ft.records.answers import Answer
from llama_ft.records.evaluation import EvaluatedModel, ExactMatch, Role, TextPerplexity
from llama_ft.techniques.mixed_precision import Precision

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # of a title and a total


@dataclass(frozen=True)
class EvalInputs:
    """What models are measured on."""

    tokenizer: Tokenizer
    data: EvaluationSet
    text: Text | None


@dataclass(frozen=True)
class Measured:
    """One model's figures, and its answers, if they were asked for."""

    model: EvaluatedModel
    answers: list[Answer]
    correct: list[bool]


def measure(model: Transformer, inputs: EvalInputs, config: EvaluateConfig, role: Role, progress: Progress) -> Measured:
    """Perplexity of the responses and of the text, if there is one; answers, if they are asked for.

    The model is in evaluation mode. Losses or logits that are not finite are a UserError.
    """
    began = time.monotonic()
    weight = model.output.weight
    padding = Padding(Precision(weight.device.type, weight.dtype).pad_multiple, config.model.max_seq_len)
    samples = [record.sample for record in inputs.data.records]
    with progress("perplexity of the responses", len(samples)) as advance:
        responses = perplexity(model, samples, config.batch_size, padding, advance)
    text = _text_perplexity(model, inputs.text, config, padding, progress) if inputs.text is not None else None
    answers, correct = _answer(model, inputs, config, progress) if config.exact_match else ([], [])
    exact_match = None
    if config.exact_match:
        share = accuracy([record.task for record in inputs.data.records], correct)
        exact_match = ExactMatch(**vars(share), ended_by_length=sum(answer.finish == "length" for answer in answers))
    is_base = role == "base"
    checkpoint = str((is_base and config.base) or config.checkpoint)
    adapter = None if is_base else config.adapter
    runtime = time.monotonic() - began
    return Measured(EvaluatedModel(role, checkpoint, adapter, responses, text, exact_match, runtime), answers, correct)


def _text_perplexity(
    model: Transformer, text: Text, config: EvaluateConfig, padding: Padding, progress: Progress
) -> TextPerplexity:
    windows = text_windows(text.tokens, config.window_tokens, config.stride_tokens)
    # Of small windows as many at once as fill the context: the memory of one full window is enough for all.
    at_once = max(1, config.model.max_seq_len // config.window_tokens)
    with progress("perplexity of the text", len(windows)) as advance:
        found = perplexity(model, windows, at_once, padding, advance)
    return TextPerplexity(**vars(found), bits_per_byte=bits_per_byte(found.nll, text), windows=len(windows))


def _answer(
    model: Transformer, inputs: EvalInputs, config: EvaluateConfig, progress: Progress
) -> tuple[list[Answer], list[bool]]:
    """The answers to all records, and which are correct."""
    prompts = [record.prompt for record in inputs.data.records]
    with progress("answers", len(prompts)) as advance:
        answers = greedy_answers(
            model, inputs.tokenizer, prompts, config.max_new_tokens, config.batch_size, config.kv_cache, advance
        )
    pairs = zip(answers, inputs.data.records, strict=True)
    return answers, [matches(answer.text, record.output) for answer, record in pairs]
