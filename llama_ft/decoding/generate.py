"""From a prompt to answers: the loop around choosing the next token, and what ends it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llama_ft.config import DecodingConfig, UserError
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.beam import beam_search
from llama_ft.decoding.context import Context
from llama_ft.decoding.sampling import Greedy, Sampling
from llama_ft.decoding.text import StopAt, TextStream
from llama_ft.model.transformer import Transformer


@dataclass(frozen=True)
class Answer:
    """What followed a prompt."""

    text: str
    n_tokens: int
    finish: str
    """What ended it: `eos`, `stop` (one of decoding.stop), or `length`."""


def ignore(text: str) -> None:
    """Do nothing."""


@torch.inference_mode()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    config: DecodingConfig,
    kv_cache: bool = True,
    on_text: Callable[[str], None] = ignore,
) -> list[Answer]:
    """Answers to a prompt, `config.num_return_sequences` of them.

    Args:
        on_text: given the first answer's text, piece by piece, as soon as it is certain; a beam search has none before
            its end.

    Raises:
        UserError: if the prompt leaves no room in the model's context, or the logits are not finite.
    """
    tokens, context_length = tokenizer.encode(prompt, bos=True), model.config.context
    if len(tokens) >= context_length:
        raise UserError(f"the prompt has {len(tokens):,} tokens, and the model's context is {context_length:,}")
    n_new = min(config.max_new_tokens, context_length - len(tokens))
    n_rows = config.n_beams if config.n_beams > 1 else config.num_return_sequences
    context = Context(model, [tokens] * n_rows, n_new, kv_cache, model.output.weight.dtype)
    writers = [_Writer(tokenizer, config.stop, on_text if row == 0 else ignore) for row in range(n_rows)]
    if config.n_beams > 1:
        found = beam_search(
            context,
            config.n_beams,
            n_new,
            tokenizer.eos_id,
            config.length_penalty,
            config.early_stopping,
            config.num_return_sequences,
        )
        for writer, hypothesis in zip(writers, found, strict=False):
            for token in hypothesis.tokens:
                writer.push(token)
        return [writer.end() for writer in writers[: len(found)]]
    _continue(context, writers, config, n_new)
    return [writer.end() for writer in writers]


def _continue(context: Context, writers: list["_Writer"], config: DecodingConfig, n_new: int) -> None:
    """Choose a token for each row, until all have ended."""
    choice: Greedy | Sampling = Greedy(config.repetition_penalty)
    if config.sample:
        choice = Sampling(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
    generator = torch.Generator(context.tokens.device).manual_seed(config.seed)
    for _ in range(n_new):
        chosen = choice.choose(context.next_logits(), context.seen(), generator)
        context.append(chosen)
        for writer, token in zip(writers, chosen.tolist(), strict=True):
            writer.push(token)
        if all(writer.finish for writer in writers):
            break


class _Writer:
    """One answer while it grows; what comes after its end is dropped."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str], on_text: Callable[[str], None]) -> None:
        self._eos_id, self._stream, self._stop = tokenizer.eos_id, TextStream(tokenizer), StopAt(stop)
        self._on_text, self._text, self._n_tokens = on_text, "", 0
        self.finish = ""

    def push(self, token: int) -> None:
        if self.finish:
            return
        self._n_tokens += 1
        if token == self._eos_id:
            self.finish = "eos"
            return
        self._add(self._stop.push(self._stream.push(token)))
        if self._stop.found is not None:
            self.finish = "stop"

    def end(self) -> Answer:
        if self.finish != "stop":
            self._add(self._stop.push(self._stream.flush()))
            self._add(self._stop.flush())
        return Answer(self._text, self._n_tokens, self.finish or "length")

    def _add(self, text: str) -> None:
        self._text += text
        self._on_text(text)
