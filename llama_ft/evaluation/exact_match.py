"""Exact match: whether a model's answer is the expected one, white space around them aside."""

from collections.abc import Callable, Sequence
from typing import Any

from llama_ft.config import DecodingConfig
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import Answer, generate
from llama_ft.evaluation.records import NO_TASK
from llama_ft.model.transformer import Transformer


def greedy_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    kv_cache: bool = True,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The most probable continuation of each prompt, token by token, to EOS or to `max_new_tokens`.

    Args:
        batch_size: prompts answered at once; those of similar length together.
        advance: told how many prompts have been answered since it was told last.

    Raises:
        UserError: if a prompt leaves no room in the model's context, or the logits are not finite.
    """
    decoding = DecodingConfig(max_new_tokens=max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        found = generate(model, tokenizer, [prompts[index] for index in group], decoding, kv_cache)
        answers |= {index: first for index, (first, *_) in zip(group, found, strict=True)}
        advance(len(group))
    return [answers[index] for index in range(len(prompts))]


def matches(answer: str, expected: str) -> bool:
    """Whether two texts are equal but for white space around them."""
    return answer.strip() == expected.strip()


def accuracy(tasks: Sequence[str], correct: Sequence[bool]) -> dict[str, Any]:
    """How many of the answers are correct, in all and by task: `{correct, records, accuracy, tasks: {NAME: {…}}}`.

    `tasks` is empty where no record names one.
    """
    by_task: dict[str, list[bool]] = {}
    for task, is_correct in zip(tasks, correct, strict=True):
        by_task.setdefault(task, []).append(is_correct)
    named = {task: _share(by_task[task]) for task in sorted(by_task)} if by_task.keys() != {NO_TASK} else {}
    return _share(correct) | {"tasks": named}


def _share(correct: Sequence[bool]) -> dict[str, Any]:
    return {"correct": sum(correct), "records": len(correct), "accuracy": sum(correct) / len(correct)}
