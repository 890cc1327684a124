"""Generates answers to prompts: the loop around choosing the next token, and its end."""

from collections.abc import Callable, Collection, Sequence

import torch

from llama_ft.config import DecodingConfig, UserError
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.beam import beam_search
from llama_ft.decoding.prompts import encode_in_context
from llama_ft.decoding.sampling import choose
from llama_ft.decoding.state import GenerationState
from llama_ft.decoding.text import StopAt, TextStream
from llama_ft.model.transformer import Transformer
from llama_ft.records.answers import Answer
from llama_ft.system import silent

GenerateFn = Callable[[Sequence[str], Callable[[str], None]], list[list[Answer]]]
"""A loaded model: called with a batch of prompts and a callback for the first answer's text; returns the answers."""
LoadFn = Callable[[bool], GenerateFn]
"""Loads the base model if called with True, else the model to use."""


@torch.inference_mode()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: DecodingConfig,
    kv_cache: bool = True,
    on_text: Callable[[str], None] = silent,
) -> list[list[Answer]]:
    """Generate `config.num_return_sequences` answers to each prompt, equal up to rounding to those without a batch.

    `on_text` receives the first answer's text piece by piece, once it is final; in beam search at the end. A prompt
    that leaves no room in the model's context is a UserError, as are logits that are not finite.
    """
    batch = [encode_in_context(prompt, tokenizer, model.config.max_seq_len) for prompt in prompts]
    n_answers = config.num_return_sequences
    writers = [
        _Writer(tokenizer, config.stop, min(config.max_new_tokens, model.config.max_seq_len - len(tokens)))
        for tokens in batch
        for _ in range(n_answers)
    ]
    writers[0].on_text = on_text
    was_training = model.training
    model.eval()  # no dropout
    try:
        if config.n_beams > 1:  # one prompt at a time, with its own batch of beams
            for index, tokens in enumerate(batch):
                _search(model, tokenizer.end_ids, tokens, writers[index * n_answers :][:n_answers], config, kv_cache)
        else:
            _continue(model, batch, writers, config, kv_cache)
    finally:
        model.train(was_training)
    answers = [writer.end() for writer in writers]
    return [answers[start : start + n_answers] for start in range(0, len(answers), n_answers)]


def _search(
    model: Transformer,
    ends: Collection[int],
    tokens: list[int],
    writers: list["_Writer"],
    config: DecodingConfig,
    kv_cache: bool,
) -> None:
    """Give the writers the best hypotheses of a beam search."""
    n_new = writers[0].room
    state = GenerationState(model, [tokens] * config.n_beams, n_new, kv_cache)
    penalty, n_answers = config.length_penalty, config.num_return_sequences
    hypotheses = beam_search(state, config.n_beams, n_new, ends, penalty, config.early_stopping, n_answers)
    if len(hypotheses) < n_answers:  # more beams than different texts of this length
        texts = f"{len(hypotheses)} different texts of {n_new} token{'s' * (n_new > 1)}"
        raise UserError(f"decoding.num_return_sequences={n_answers} is too many: only {texts} exist")
    for writer, hypothesis in zip(writers, hypotheses, strict=True):
        for token in hypothesis.tokens:
            writer.push(token)


def _continue(
    model: Transformer, batch: list[list[int]], writers: list["_Writer"], config: DecodingConfig, kv_cache: bool
) -> None:
    """Choose a token for each row, until all writers have ended."""
    rows = [tokens for tokens in batch for _ in range(config.num_return_sequences)]
    n_new = max(writer.room for writer in writers)
    state = GenerationState(model, rows, n_new, kv_cache)
    # One for each prompt, so that its answers do not depend on other prompts in the batch.
    generators = [torch.Generator(state.tokens.device).manual_seed(config.seed) for _ in batch]
    for _ in range(n_new):
        seen = state.seen() if config.repetition_penalty != 1 else None
        chosen = choose(state.next_logits(), config, seen, generators)
        state.append(chosen)
        for writer, token in zip(writers, chosen.tolist(), strict=True):
            writer.push(token)
        if all(writer.finish for writer in writers):
            break


class _Writer:
    """A growing answer of at most `room` tokens; tokens after its end are dropped."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str], room: int) -> None:
        self._ends, self._stream, self._stop = tokenizer.end_ids, TextStream(tokenizer), StopAt(stop)
        self.on_text: Callable[[str], None] = silent
        self.room, self._text, self._n_tokens = room, "", 0
        self.finish = ""

    def push(self, token: int) -> None:
        if self.finish:
            return
        self._n_tokens += 1
        if token in self._ends:
            self.finish = "eos"
            return
        self._add(self._stop.push(self._stream.push(token)))
        if self._stop.found is not None:
            self.finish = "stop"
        elif self._n_tokens == self.room:
            self.finish = "length"

    def end(self) -> Answer:
        if self.finish != "stop":
            self._add(self._stop.push(self._stream.flush()))
            self._add(self._stop.flush())
        return Answer(self._text, self._n_tokens, self.finish or "length")

    def _add(self, text: str) -> None:
        self._text += text
        self.on_text(text)
