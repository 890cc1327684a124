"""Answering a file of prompts: by one model, or by two to be compared, one of which is in memory at a time."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ft.config import GenerateConfig
from llama_ft.decoding.generate import Answer, GenerateFn, ignore
from llama_ft.decoding.prompts import Prompt
from llama_ft.decoding.results import Printed, Results, ResultsFile, settings_of

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # of a title and a total


def answer_values(answers: Sequence[Answer]) -> dict[str, Any]:
    """What a result has of the answers to its prompt: `{answer, finish, n_tokens}`; of several `answers`, lists all."""
    if len(answers) == 1:
        return {"answer": answers[0].text, "finish": answers[0].finish, "n_tokens": answers[0].n_tokens}
    return {
        "answers": [answer.text for answer in answers],
        "finish": [answer.finish for answer in answers],
        "n_tokens": [answer.n_tokens for answer in answers],
    }


def base_values(answers: Sequence[Answer]) -> dict[str, Any]:
    """What a result has of the base's: `{base_answer}`; of several `base_answers`, a list."""
    key, *_ = values = answer_values(answers)
    return {f"base_{key}": values[key]}


def result_keys(config: GenerateConfig) -> list[str]:
    """The keys that a result has beside those of its prompt's record; the base's, where there is one, is the first."""
    answers = [Answer("", 0, "")] * config.decoding.num_return_sequences
    return [*(base_values(answers) if config.compare else []), *answer_values(answers)]


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, to be answered."""

    config: GenerateConfig
    prompts: Sequence[Prompt]
    dtype: str
    """That of the arithmetic, `auto` resolved."""
    load: Callable[[bool], GenerateFn]
    """Loads the base if it is given True, else the model that is asked."""
    progress: Progress
    """Shows a title and how much of a total is done."""
    log: Callable[[str], None]

    def answer(self) -> None:
        """Answer the prompts that have no result yet, and write the results to `config.output`, else print them.

        Raises:
            UserError: before anything is generated, if the output is of other prompts or settings.
        """
        with self._results(result_keys(self.config)) as results:
            try:
                if self.config.compare and len(results.kept) < len(self.prompts):
                    self._compare(results)
                else:
                    self._fill(results, self.prompts, is_base=False)
            finally:
                if self.config.output is not None and results.kept:
                    counts = f"{len(results.kept)} of {len(self.prompts)} prompts"
                    self.log(f"{counts} are answered in {self.config.output}")

    def _compare(self, results: Results) -> None:
        """Let the base answer all prompts first, into a file that is no longer needed once all is done."""
        with self._results(result_keys(self.config)[:1], ".base") as base:
            self._fill(base, self.prompts, is_base=True)
            prompts = [Prompt(prompt.text, kept) for prompt, kept in zip(self.prompts, base.kept, strict=True)]
            self._fill(results, prompts, is_base=False)
            base.remove()

    def _results(self, keys: list[str], suffix: str = "") -> Results:
        """Where results with these keys go; those with a suffix are not for the user."""
        if self.config.output is None:
            return Printed(is_shown=not suffix)
        file = Path(os.path.expanduser(self.config.output + suffix))
        return ResultsFile(file, settings_of(self.config, self.dtype, self.prompts), self.prompts, keys)

    def _fill(self, results: Results, prompts: Sequence[Prompt], is_base: bool) -> None:
        """Let a model answer the prompts that have no result, batch by batch."""
        n_done, values = len(results.kept), base_values if is_base else answer_values
        if n_done == len(prompts):
            return
        answer, size = self.load(is_base), self.config.batch_size
        with self.progress("answers of the base" if is_base else "answers", len(prompts) - n_done) as advance:
            for start in range(n_done, len(prompts), size):
                batch = prompts[start : start + size]
                for prompt, answers in zip(batch, answer([prompt.text for prompt in batch], ignore), strict=True):
                    results.write(prompt.record | values(answers))
                advance(len(batch))
