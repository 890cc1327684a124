"""Perplexity of a text, by sliding windows, and of the responses in instruction records."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_ft.config import UserError
from llama_ft.data.collate import NO_PADDING, Padding, collate
from llama_ft.data.records import Sample, Samples
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.files import text_of
from llama_ft.model.transformer import Transformer
from llama_ft.records.evaluation import Perplexity
from llama_ft.training.held_out import MAX_NATS
from llama_ft.training.step import summed_loss


@dataclass(frozen=True)
class Text:
    """A text file as tokens."""

    file: Path
    tokens: list[int]  # BOS first
    n_bytes: int  # of the text in UTF-8


def read_text(file: Path, tokenizer: Tokenizer) -> Text:
    """Read a UTF-8 file and tokenize it as one text, keeping line endings, with BOS before it and no EOS."""
    text = text_of(file, f"text={file}")
    tokens = tokenizer.encode(text, bos=True)
    if len(tokens) < 2:
        raise UserError(f"text={file} is empty")
    return Text(file, tokens, len(text.encode()))


def text_windows(tokens: Sequence[int], window: int, stride: int) -> list[Sample]:
    """Cut a text of at least 2 tokens into windows, each counting only tokens that no earlier window held.

    This is Hugging Face's method for models of a fixed context (https://huggingface.co/docs/transformers/perplexity):
    each token counts once, and after the first window it has at least window - stride tokens before it. A window's
    first token has no context and does not count: in the first window that is BOS; with stride = window it is the first
    token of every window. `window` must be at least `stride`.
    """
    samples: list[Sample] = []
    for start in range(0, len(tokens), stride):
        n_seen = max(1, window - stride) if start else 1
        sample = Sample.after(list(tokens[start : start + window]), n_seen)
        if sample.n_targets > 0:
            samples.append(sample)
        if start + window >= len(tokens):
            break
    return samples


def bits_per_byte(nll: float, text: Text) -> float:
    """Bits per byte of a text from its mean nll in nats, to compare tokenizers; uncounted tokens cost the mean."""
    return nll / math.log(2) * (len(text.tokens) - 1) / text.n_bytes


@torch.inference_mode()
def perplexity(
    model: Transformer,
    samples: Samples,
    batch_size: int,
    padding: Padding = NO_PADDING,
    advance: Callable[[int], None] = lambda count: None,
) -> Perplexity:
    """Perplexity over all target tokens of the samples; the head and the loss run only at those.

    Samples are sorted by length, which saves padding. A loss that is not finite is a UserError.
    """
    device = model.output.weight.device
    ordered = sorted(samples, key=len, reverse=True)  # longest first, so that running out of memory shows at once
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        total += summed_loss(model, collate(batch, padding).to(device))
        advance(len(batch))
    n_tokens = sum(sample.n_targets for sample in samples)
    nll = total.item() / n_tokens
    if not nll < MAX_NATS:
        dtype = str(model.output.weight.dtype).removeprefix("torch.")
        raise UserError(f"the loss is {nll:g} in {dtype}: the weights are damaged, or need dtype=fp32")
    return Perplexity(math.exp(nll), nll, n_tokens)
