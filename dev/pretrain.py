"""Pretrains the built-in model on our own text: `python -m dev.pretrain`.

Writes `model.safetensors` and the checksums next to tiny's tokenizer, or into `--out`. Two runs with the same number of
threads on the same kind of processor write the same file.

Three things make half an hour on two cores enough. Single short lessons come before whole pages: in a few words a model
soon finds what an answer depends on. Answers, which can be known, count ten times as much as text drawn at random. And
embedding and head are one matrix, so that a word can be written as soon as it can be read.
"""

import argparse
import ctypes
import hashlib
import math
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from dev.textbook import CLOSE, OPEN, lessons, pages
from llama_ft.config import PACKAGE_DIR, ModelConfig, UserError, config_dir
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.files import WEIGHTS_FILE, output_folder, write_text
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import save_tensors

STEPS = 2500
SHORT_SHARE = 0.4  # of the steps, with only short lessons
SHORT, LONG = 26, 48  # the most tokens of a lesson
PAGE_ROWS, PAGE_LENGTH = 8, 256
LR, WARMUP, DECAY = 2e-3, 60, 0.4  # the last 40 % of the steps bring the learning rate down to 0
REST = 0.1  # weight of the loss on tokens that are not an answer's
SEED = 2023
TINY = PACKAGE_DIR / "model" / "tiny"
CHECKSUMS = "SHA256SUMS"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h

Weighted = tuple[list[int], list[float]]  # token ids, and the weight of the loss on each


def encode(text: str, tokenizer: Tokenizer) -> Weighted:
    """Tokenize a text with marked answers, from BOS to EOS. An answer's weight includes the token that ends it."""
    parts = re.split(f"[{OPEN}{CLOSE}]", text)  # every second one is an answer
    plain = "".join(parts)
    tokens = tokenizer.encode(plain, bos=True, eos=True)
    weights, end = [REST] * len(tokens), 0
    for number, part in enumerate(parts):
        start, end = end, end + len(part)
        if number % 2:
            first, last = (_n_common(tokenizer.encode(plain[:place], bos=True), tokens) for place in (start, end))
            weights[first : last + 1] = [1.0] * len(weights[first : last + 1])
    return tokens, weights


def _n_common(first: list[int], second: list[int]) -> int:
    """The number of tokens that two texts share at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def lesson_batches(tokenizer: Tokenizer, seed: int, most: int) -> Iterator[list[Weighted]]:
    """Batches of single lessons of at most `most` tokens, padded on the right; padding has no weight."""
    encoded = (encode(text, tokenizer) for text in lessons(random.Random(seed), most == SHORT))
    fitting = ((tokens[:-1], weights[:-1]) for tokens, weights in encoded if len(tokens) <= most)  # without EOS
    n_rows = PAGE_ROWS * PAGE_LENGTH * 3 // (2 * most)
    while batch := list(islice(fitting, n_rows)):
        width = max(len(tokens) for tokens, _ in batch)
        yield [(t + [0] * (width - len(t)), w + [0.0] * (width - len(w))) for t, w in batch]


def page_batches(tokenizer: Tokenizer, seed: int) -> Iterator[list[Weighted]]:
    """Batches of consecutive pages, cut wherever a row is full."""
    rows: list[Weighted] = []
    waiting: Weighted = [], []
    for page in pages(random.Random(seed)):
        for kept, new in zip(waiting, encode(page, tokenizer), strict=True):
            kept += new  # type: ignore[operator]
        while len(waiting[0]) > PAGE_LENGTH:
            rows.append((waiting[0][: PAGE_LENGTH + 1], waiting[1][: PAGE_LENGTH + 1]))
            waiting = waiting[0][PAGE_LENGTH:], waiting[1][PAGE_LENGTH:]
        while len(rows) >= PAGE_ROWS:
            yield rows[:PAGE_ROWS]
            rows = rows[PAGE_ROWS:]


def batches(tokenizer: Tokenizer, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a training, int64 and fp32 [rows, length]: short lessons first, then longer ones and pages."""
    short, long = (lesson_batches(tokenizer, SEED + most, most) for most in (SHORT, LONG))
    whole = page_batches(tokenizer, SEED)
    for step in range(steps):
        batch = next(short if step < SHORT_SHARE * steps else (whole if step % 2 else long))
        tokens, weights = zip(*batch, strict=True)
        yield torch.tensor(tokens), torch.tensor(weights)


def lr_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step counted from 0: warm-up, constant, then linearly down to 0."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


@torch.no_grad()
def initialize(model: Transformer) -> None:
    """Draw normal weights with variance 1 / fan-in, smaller by depth where they add to the residual; tie the head."""
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
            continue
        adds = name.endswith(("wo.weight", "w2.weight"))
        weight.normal_(0.0, (weight.shape[1] * (2 * model.config.n_layers if adds else 1)) ** -0.5, generator=generator)
    model.output.weight = model.tok_embeddings.weight


def pretrain(model: Transformer, tokenizer: Tokenizer, steps: int = STEPS, console: Console | None = None) -> float:
    """Train the model from scratch.

    Returns:
        The mean loss on an answer's tokens over the last 50 steps, in nats.
    """
    initialize(model)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    answers: list[float] = []
    began = time.monotonic()
    for step, (tokens, weights) in enumerate(batches(tokenizer, steps), start=1):
        logits, counts = model(tokens[:, :-1]).flatten(0, 1), weights[:, 1:].flatten()
        losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        ((losses * counts).sum() / counts.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        answers.append(losses.detach()[counts == 1].mean().item())
        if not math.isfinite(answers[-1]):
            raise SystemExit(f"error: the loss is {answers[-1]} at step {step}")
        if console is not None and (step % 50 == 0 or step == steps):
            mean, seconds = sum(answers[-50:]) / len(answers[-50:]), time.monotonic() - began
            left = seconds / step * (steps - step)
            line = f"{step}/{steps}  loss on answers {mean:.3f}  {seconds:,.0f} s, {left:,.0f} s to go"
            console.print(line, highlight=False)
    return sum(answers[-50:]) / len(answers[-50:])


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: returning and reallocating each step's tensors would cost a third of the time."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for setting in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(setting, 2**30)


def main() -> None:
    """Pretrain and write the files."""
    parser = argparse.ArgumentParser(description="Pretrain the built-in model on our own text.")
    parser.add_argument("--out", help="folder for model.safetensors and SHA256SUMS; default: tiny's own, which ships")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of about 2,000 tokens")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number rounds differently")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    if arguments.steps != STEPS and arguments.out is None:
        parser.error("--steps is for trials, which must not replace the weights that ship: give --out too")
    try:
        with output_folder(arguments.out or str(TINY), "pretraining", TINY.name) as out:
            pretrain_into(out, arguments.steps, arguments.threads)
    except UserError as error:
        parser.error(str(error).replace("output=", "--out ", 1))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


def pretrain_into(out: Path, steps: int, threads: int) -> None:
    """Pretrain, and write the files into a folder."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    sizes = OmegaConf.to_container(OmegaConf.load(config_dir() / "model" / "tiny.yaml"))
    config = ModelConfig(**cast(dict[str, Any], sizes))
    tokenizer, model = Tokenizer(TINY / "tokenizer.model"), Transformer(config)
    pretrain(model, tokenizer, steps, Console())
    # 16 bit halves the file; weights are loaded as fp32. Embedding and head are saved separately.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    save_tensors({name: model.get_parameter(name).half() for name in names}, out / WEIGHTS_FILE, config)
    files = [name for name in (WEIGHTS_FILE, "tokenizer.model") if (out / name).is_file()]
    sums = (f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
    write_text(out / CHECKSUMS, "".join(sums))
    print(f"Weights and checksums are in {os.path.relpath(out)}")


if __name__ == "__main__":
    main()
