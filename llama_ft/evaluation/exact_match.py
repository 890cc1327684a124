"""Exact match: whether a model's answer is the expected one, white space around them aside."""

from collections.abc import Callable, Sequence

from llama_ft.config import DecodingConfig
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import generate
from llama_ft.evaluation.records import NO_TASK
from llama_ft.model.transformer import Transformer
from llama_ft.records.answers import Answer
from llama_ft.records.evaluation import Accuracy, Share


def greedy_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    kv_cache: bool = True,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The most probable continuation of each prompt, to EOS or `max_new_tokens`; those of similar length together."""
    decoding = DecodingConfig(max_new_tokens=max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        results = generate(model, tokenizer, [prompts[index] for index in batch], decoding, kv_cache)
        answers |= {index: first for index, (first, *_) in zip(batch, results, strict=True)}
        advance(len(batch))
    return [answers[index] for index in range(len(prompts))]


def matches(answer: str, expected: str) -> bool:
    """Whether two texts are equal but for white space around them."""
    return answer.strip() == expected.strip()


def accuracy(tasks: Sequence[str], correct: Sequence[bool]) -> Accuracy:
    """How many of the answers are correct, in all and by task."""
    by_task: dict[str, list[bool]] = {}
    for task, is_correct in zip(tasks, correct, strict=True):
        by_task.setdefault(task, []).append(is_correct)
    named = {task: Share(*_share(by_task[task])) for task in sorted(by_task)} if by_task.keys() != {NO_TASK} else {}
    return Accuracy(*_share(correct), named)


def _share(correct: Sequence[bool]) -> tuple[int, int, float]:
    return sum(correct), len(correct), sum(correct) / len(correct)
