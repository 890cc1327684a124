"""Measures a model, or a base model and a fine-tuned model one after the other."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llama_ft.config import DecodingConfig, EvaluateConfig
from llama_ft.data.collate import Padding
from llama_ft.data.template import Template
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import generate
from llama_ft.decoding.load import check_sources, load_base, load_trained, storage_of
from llama_ft.evaluation.perplexity import Text, bits_per_byte, perplexity, text_windows
from llama_ft.evaluation.records import EvaluationSet, accuracy
from llama_ft.model.transformer import Transformer
from llama_ft.records.answers import Answer
from llama_ft.records.evaluation import EvaluatedModel, ExactMatch, Role, TextPerplexity
from llama_ft.system import Advance, Log, Progress
from llama_ft.techniques.mixed_precision import Precision

Measured = tuple[EvaluatedModel, list[Answer]]  # no answers if none were requested


@dataclass(frozen=True)
class EvalInputs:
    """The inputs of an evaluation."""

    tokenizer: Tokenizer
    template: Template
    data: EvaluationSet
    text: Text | None


def measure_models(
    config: EvaluateConfig, inputs: EvalInputs, device: torch.device, progress: Progress, log: Log
) -> list[Measured]:
    """Measure the model, or base and fine-tuned model, one in memory at a time; a UserError if one is damaged."""

    def measured(role: Role, load: Callable[..., Transformer]) -> Measured:
        model, name = load(config, device, storage_of(config.dtype, device, config.gpu), log), role.replace("_", "-")
        result = measure(model, inputs, config, role, lambda title, total: progress(f"{name}, {title}", total))
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    check_sources(config)
    if config.adapter is None and config.base is None:
        return [measured("model", load_trained)]
    fine_tuned = measured("fine_tuned", load_trained)  # first, since it is the most likely to fail
    return [measured("base", load_base), fine_tuned]


def measure(model: Transformer, inputs: EvalInputs, config: EvaluateConfig, role: Role, progress: Progress) -> Measured:
    """Perplexity of the responses and of the text, if any; exact match and answers, if requested.

    The model must be in evaluation mode. Losses or logits that are not finite are a UserError.
    """
    began = time.monotonic()
    weight, records = model.output.weight, inputs.data.records
    padding = Padding(Precision(weight.device.type, weight.dtype).pad_multiple, config.model.max_seq_len)
    with progress("perplexity of the responses", len(records)) as advance:
        responses = perplexity(model, inputs.data.samples, config.batch_size, padding, advance)
    text = None
    if inputs.text is not None:
        windows = text_windows(inputs.text.tokens, config.window_tokens, config.stride_tokens)
        # As many small windows at once as fill the context: they need no more memory than one full window.
        at_once = max(1, config.model.max_seq_len // config.window_tokens)
        with progress("perplexity of the text", len(windows)) as advance:
            found = perplexity(model, windows, at_once, padding, advance)
        text = TextPerplexity(**vars(found), bits_per_byte=bits_per_byte(found.nll, inputs.text), windows=len(windows))
    answers: list[Answer] = []
    exact_match = None
    if config.exact_match:
        prompts = [inputs.template.prompt(record) for record in records]
        with progress("answers", len(prompts)) as advance:
            answers = greedy_answers(model, inputs.tokenizer, prompts, config, advance)
        correct = [inputs.data.is_correct(index, answer.text) for index, answer in enumerate(answers)]
        share = accuracy([record.task for record in records], correct)
        exact_match = ExactMatch(**vars(share), ended_by_length=sum(answer.finish == "length" for answer in answers))
    own = config.checkpoint, config.adapter
    checkpoint, adapter = (config.base or config.checkpoint, None) if role == "base" else own
    runtime = time.monotonic() - began
    return EvaluatedModel(role, str(checkpoint), adapter, responses, text, exact_match, runtime), answers


def greedy_answers(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], config: EvaluateConfig, advance: Advance
) -> list[Answer]:
    """The greedy continuation of each prompt, to EOS or `max_new_tokens`, batched by similar length."""
    decoding = DecodingConfig(max_new_tokens=config.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        results = generate(model, tokenizer, [prompts[index] for index in batch], decoding, config.kv_cache)
        answers |= {index: first for index, (first, *_) in zip(batch, results, strict=True)}
        advance(len(batch))
    return [answers[index] for index in range(len(prompts))]
