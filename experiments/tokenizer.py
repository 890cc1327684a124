"""`python -m experiments.tokenizer`: how LLaMA-2's kind of tokenizer treats text, and the lengths of Alpaca's samples.

Texts are tokenized by the built-in tokenizer, or `tokenizer=FILE`. Lengths are those of Alpaca's first 200 records with
LLaMA-2's tokenizer, shipped as counts without the text.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments.figure import BLUE, GRAY, ORANGE, drawn
from experiments.shared import alpaca_samples, sample_records, tiny_tokenizer
from experiments.study import Claim, Log, Numbers, Options, Study, main, table
from llama_ft.config.checks import setting
from llama_ft.data.prompt import prompt_text
from llama_ft.data.records import Record, Sample
from llama_ft.data.template import ALPACA_TEMPLATE
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.training.loop import Windows

WORD, TEXT = "dog", "The dog has seen the old house"
NUMBER = "31415926"
SPELLED = ("<s>", "</s>", "<unk>", "a</s>b", "<0x41>")
N_RECORDS, N_CHARACTERS = 200, 500
BATCH_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass
class TokenizerOptions(Options):
    """Options of this study."""

    tokenizer: str | None = setting(None, "a tokenizer.model, such as LLaMA-2's; null is the built-in one")


def measure(options: TokenizerOptions, log: Log) -> Numbers:
    """Tokenize and count.

    Raises:
        UserError: if the tokenizer cannot be read.
    """
    file = options.tokenizer
    tokenizer = Tokenizer(Path(os.path.expanduser(file))) if file else tiny_tokenizer()
    log("texts, lengths, padding")
    return {
        "tokenizer": file or "built-in",
        "quirks": text_quirks(tokenizer) | record_quirks(tokenizer, sample_records("train", N_RECORDS)),
        "lengths": lengths_of(alpaca_samples()),
    }


def characters() -> list[str]:
    """Random characters of all scripts, assigned or not, without surrogates."""
    points = [*range(0x20, 0xD800), *range(0xE000, 0x1FB00)]
    return [chr(point) for point in random.Random(0).choices(points, k=N_CHARACTERS)]


def text_quirks(tokenizer: Tokenizer) -> Numbers:
    """The tokenizer's effects on words and characters."""
    texts, special = [TEXT, f" {TEXT}", "two  spaces", "\ttab\n", *characters()], {tokenizer.bos_id, tokenizer.eos_id}
    before = len(tokenizer.encode("a"))
    sizes = [(len(tokenizer.encode(f"a{text}")) - before, len(text.encode())) for text in characters()]
    return {
        "word_alone": tokenizer.encode(WORD),
        "word_within": tokenizer.encode(f"the {WORD}")[1:],
        "texts": len(texts),
        "texts_changed": sum(tokenizer.decode(tokenizer.encode(text)) != text for text in texts),
        "spaces": TEXT.count(" "),
        "spaces_one_by_one": "".join(tokenizer.decode([token]) for token in tokenizer.encode(TEXT)).count(" "),
        "characters": N_CHARACTERS,
        "characters_of_several_tokens": sum(n_tokens > 1 for n_tokens, _ in sizes),
        "most_tokens_beyond_bytes": max(n_tokens - n_bytes for n_tokens, n_bytes in sizes),
        "special_spelled": sum(bool(special & {*tokenizer.encode(text)}) for text in SPELLED),
        "digits": len(NUMBER),
        "digit_tokens": len(tokenizer.encode(f"a {NUMBER}")) - len(tokenizer.encode("a ")),
    }


def record_quirks(tokenizer: Tokenizer, records: Sequence[Record]) -> Numbers:
    """The tokenizer's effects on built-in records."""
    special = {tokenizer.bos_id, tokenizer.eos_id}
    samples = [ALPACA_TEMPLATE.sample(record, tokenizer) for record in records]
    prompts = [(prompt_text(record.instruction, record.input), record.output) for record in records]
    whole = [tokenizer.encode(prompt + answer) for prompt, answer in prompts]
    apart = [tokenizer.encode(prompt) + tokenizer.encode(answer) for prompt, answer in prompts]
    return {
        "records": len(records),
        "records_alike_apart": sum(one == other for one, other in zip(apart, whole, strict=True)),
        "samples_of_one_text": sum(
            sample.tokens[1:-1] == tokens for sample, tokens in zip(samples, whole, strict=True)
        ),
        "samples_with_bos_and_eos": sum(
            [index for index, token in enumerate(sample.tokens) if token in special] == [0, len(sample) - 1]
            for sample in samples
        ),
    }


def lengths_of(samples: Sequence[Sample]) -> Numbers:
    """The samples' lengths, the tokens trained on, and the share of padding in micro-batches of them."""
    n_tokens = [len(sample) for sample in samples]
    padding = {}
    for size in BATCH_SIZES:
        computed = sum(batch.tokens.numel() for window in Windows(samples, size).epoch(0) for batch in window)
        padding[str(size)] = 1 - sum(len(sample) - 1 for sample in samples) / computed
    return {
        "samples": len(samples),
        "tokens": sum(n_tokens),
        "median": median(n_tokens),
        "longest": max(n_tokens),
        "trained": sum(sample.n_targets for sample in samples),
        "each": [[sample.n_prompt, len(sample)] for sample in samples],
        "padding": padding,
    }


def claims_of(numbers: Numbers) -> list[Claim]:
    """The claims, checked against the numbers."""
    return [*_quirk_claims(numbers["quirks"]), *_length_claims(numbers["lengths"])]


def _quirk_claims(quirks: Numbers) -> list[Claim]:
    return [
        Claim(
            "a first word gets a space before it, so that it is the same token as within a text; decoding takes it away"
            " again, and gives each text back",
            quirks["word_alone"] == quirks["word_within"] and quirks["texts_changed"] == 0,
            {
                "tokens of the word": len(quirks["word_alone"]),
                "texts": quirks["texts"],
                "changed": quirks["texts_changed"],
            },
        ),
        Claim(
            "so tokens decoded one by one have no spaces between words",
            quirks["spaces_one_by_one"] == 0 < quirks["spaces"],
            {"spaces": quirks["spaces"], "one by one": quirks["spaces_one_by_one"]},
        ),
        Claim(
            "and prompt and answer tokenized apart are never the tokens of both as one text, which a sample has",
            quirks["records_alike_apart"] == 0 and quirks["samples_of_one_text"] == quirks["records"],
            {"records": quirks["records"], "alike": quirks["records_alike_apart"]},
        ),
        Claim(
            "no character is unknown: what has no piece of its own becomes the bytes of its UTF-8, and comes back",
            quirks["texts_changed"] == 0
            and quirks["most_tokens_beyond_bytes"] <= 0 < quirks["characters_of_several_tokens"],
            {"characters": quirks["characters"], "of several tokens": quirks["characters_of_several_tokens"]},
        ),
        Claim(
            "text never spells BOS or EOS; each sample has one at its beginning and one at its end, and no other",
            quirks["special_spelled"] == 0 and quirks["samples_with_bos_and_eos"] == quirks["records"],
            {"samples": quirks["records"], "as said": quirks["samples_with_bos_and_eos"]},
        ),
        Claim(
            "each digit is a token",
            quirks["digit_tokens"] == quirks["digits"],
            {"digits": quirks["digits"], "tokens": quirks["digit_tokens"]},
        ),
    ]


def _length_claims(lengths: Numbers) -> list[Claim]:
    trained, padding = lengths["trained"] / lengths["tokens"], lengths["padding"]
    return [
        Claim(
            "Alpaca's samples are uneven: the longest has twice the median's tokens or more",
            lengths["longest"] >= 2 * lengths["median"],
            {key: lengths[key] for key in ("samples", "tokens", "median", "longest")},
        ),
        Claim(
            "so a third or more of micro-batches of 8, as they are drawn, is padding, of micro-batches of 1 none",
            padding["1"] == 0 and padding["8"] >= 1 / 3,
            {f"percent, {size}": 100 * padding[str(size)] for size in (1, 8, 32)},
        ),
        Claim(
            "less than 60 percent of their tokens are trained on: answers and EOS",
            0 < trained < 0.6,
            {"percent": 100 * trained, "tokens": lengths["trained"]},
        ),
    ]


def table_of(numbers: Numbers) -> str:
    """Tokens of the samples, and padding by micro-batch size."""
    lengths = numbers["lengths"]
    keys = ("samples", "tokens", "median", "longest", "trained")
    rows = [[size, f"{100 * share:.1f}%"] for size, share in lengths["padding"].items()]
    sizes = table(keys, [[lengths[key] for key in keys]])
    return sizes + "\n" + table(("samples in a micro-batch", "of it padding"), rows)


def draw(numbers: Numbers, file: Path) -> None:
    """Draw the samples by length, with the trained part in color, and padding by micro-batch size."""
    lengths = numbers["lengths"]
    with drawn(file, (f"{lengths['samples']} samples, tokens", "positions computed, percent")) as (tokens, share):
        ordered = sorted(lengths["each"], key=lambda pair: pair[1])
        prompts = [n_prompt for n_prompt, _ in ordered]
        answers = [n_tokens - n_prompt for n_prompt, n_tokens in ordered]
        tokens.bar(range(len(ordered)), prompts, 1.0, color=GRAY, label="prompt")
        tokens.bar(range(len(ordered)), answers, 1.0, bottom=prompts, color=ORANGE, label="answer, trained on")
        tokens.set(xlabel="sample, shortest first")
        tokens.legend(frameon=False, loc="upper left")
        sizes, padding = list(lengths["padding"]), [100 * part for part in lengths["padding"].values()]
        trained, ends = lengths["trained"] / lengths["tokens"], [0.0] * len(sizes)
        for name, of_the_rest, color in (("answer", trained, ORANGE), ("prompt", 1 - trained, GRAY)):
            heights = [of_the_rest * (100 - part) for part in padding]
            share.bar(sizes, heights, 0.7, bottom=ends, color=color, label=name)
            ends = [end + height for end, height in zip(ends, heights, strict=True)]
        share.bar(sizes, padding, 0.7, bottom=ends, color=BLUE, label="padding")
        share.set(xlabel="samples in a micro-batch", ylim=(0, 125), yticks=[0, 25, 50, 75, 100])
        share.legend(frameon=False, loc="upper left", ncols=3)


STUDY = Study("tokenizer", TokenizerOptions, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    main(STUDY)
