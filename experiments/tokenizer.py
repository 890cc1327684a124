"""`python -m experiments.tokenizer`: what LLaMA-2's kind of tokenizer does to text, and how long Alpaca's samples are.

Texts go through the built-in tokenizer, or `tokenizer=FILE`. Lengths are those of Alpaca's first 200 records with
LLaMA-2's tokenizer, which ship as counts without the text.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from experiments.figure import BLUE, GREY, ORANGE, drawn
from experiments.study import Claim, Numbers, Options, Study, main, table
from llama_ft.config.checks import setting

if TYPE_CHECKING:
    from llama_ft.data.dataset import Record, Sample
    from llama_ft.data.tokenizer import Tokenizer

WORD, TEXT = "dog", "The dog has seen the old house"
NUMBER = "31415926"
SPELLED = ("<s>", "</s>", "<unk>", "a</s>b", "<0x41>")
N_RECORDS, N_CHARACTERS = 200, 500
BATCH_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class TokenizerOptions(Options):
    """What this study can be told."""

    tokenizer: Path | None = setting(None, "a tokenizer.model, LLaMA-2's say; null is the built-in one")


def characters() -> list[str]:
    """Characters of all scripts, assigned or not, but no halves of surrogate pairs."""
    points = [*range(0x20, 0xD800), *range(0xE000, 0x1FB00)]
    return [chr(point) for point in random.Random(0).choices(points, k=N_CHARACTERS)]


def quirks(tokenizer: "Tokenizer", records: Sequence["Record"]) -> dict[str, Any]:
    """What the tokenizer does to texts, and to built-in records."""
    from llama_ft.data.dataset import encode_record
    from llama_ft.data.prompt import prompt_text

    whole = tokenizer.encode(TEXT)
    texts = [TEXT, f" {TEXT}", "two  spaces", "\ttab\n", *characters()]
    special = {tokenizer.bos_id, tokenizer.eos_id}
    samples = [encode_record(record, tokenizer) for record in records]
    prompts = [(prompt_text(record.instruction, record.input), record.output) for record in records]
    before = len(tokenizer.encode("a"))
    sizes = [(len(tokenizer.encode(f"a{each}")) - before, len(each.encode())) for each in characters()]
    return {
        "word_alone": tokenizer.encode(WORD),
        "word_within": tokenizer.encode(f"the {WORD}")[1:],
        "texts": len(texts),
        "texts_changed": sum(tokenizer.decode(tokenizer.encode(text)) != text for text in texts),
        "spaces": TEXT.count(" "),
        "spaces_one_by_one": "".join(tokenizer.decode([token]) for token in whole).count(" "),
        "records": len(records),
        "records_alike_apart": sum(
            tokenizer.encode(prompt) + tokenizer.encode(answer) == tokenizer.encode(prompt + answer)
            for prompt, answer in prompts
        ),
        "samples_of_one_text": sum(
            sample.tokens[1:-1] == tokenizer.encode(prompt + answer)
            for sample, (prompt, answer) in zip(samples, prompts, strict=True)
        ),
        "characters": N_CHARACTERS,
        "characters_of_several_tokens": sum(n_tokens > 1 for n_tokens, _ in sizes),
        "most_tokens_beyond_bytes": max(n_tokens - n_bytes for n_tokens, n_bytes in sizes),
        "special_spelled": sum(bool(special & {*tokenizer.encode(text)}) for text in SPELLED),
        "samples_with_bos_and_eos": sum(
            [place for place, token in enumerate(sample.tokens) if token in special] == [0, len(sample) - 1]
            for sample in samples
        ),
        "digits": len(NUMBER),
        "digit_tokens": len(tokenizer.encode(f"a {NUMBER}")) - len(tokenizer.encode("a ")),
    }


def lengths_of(samples: Sequence["Sample"]) -> dict[str, Any]:
    """How long the samples are, how much of them is trained on, and what padding adds to micro-batches of them."""
    from llama_ft.data.collate import epoch_batches

    n_tokens = [len(sample) for sample in samples]
    padding = {}
    for size in BATCH_SIZES:
        batches = epoch_batches(samples, size, epoch=0, seed=0)
        computed = sum(batch.tokens.numel() for batch in batches)
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
    """What the numbers say of each claim."""
    found, lengths = numbers["quirks"], numbers["lengths"]
    trained, padding = lengths["trained"] / lengths["tokens"], lengths["padding"]
    return [
        Claim(
            "a first word gets a space before it, so that it is the same token as within a text; decoding takes it away"
            " again, and gives each text back",
            found["word_alone"] == found["word_within"] and found["texts_changed"] == 0,
            {
                "tokens of the word": len(found["word_alone"]),
                "texts": found["texts"],
                "changed": found["texts_changed"],
            },
        ),
        Claim(
            "so tokens decoded one by one have no spaces between words",
            found["spaces_one_by_one"] == 0 < found["spaces"],
            {"spaces": found["spaces"], "one by one": found["spaces_one_by_one"]},
        ),
        Claim(
            "and prompt and answer tokenized apart are never the tokens of both as one text, which a sample has",
            found["records_alike_apart"] == 0 and found["samples_of_one_text"] == found["records"],
            {"records": found["records"], "alike": found["records_alike_apart"]},
        ),
        Claim(
            "no character is unknown: what has no piece of its own becomes the bytes of its UTF-8, and comes back",
            found["texts_changed"] == 0
            and found["most_tokens_beyond_bytes"] <= 0 < found["characters_of_several_tokens"],
            {"characters": found["characters"], "of several tokens": found["characters_of_several_tokens"]},
        ),
        Claim(
            "text never spells BOS or EOS; each sample has one at its beginning and one at its end, and no other",
            found["special_spelled"] == 0 and found["samples_with_bos_and_eos"] == found["records"],
            {"samples": found["records"], "as said": found["samples_with_bos_and_eos"]},
        ),
        Claim(
            "each digit is a token",
            found["digit_tokens"] == found["digits"],
            {"digits": found["digits"], "tokens": found["digit_tokens"]},
        ),
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
    """Tokens of the samples, and padding by the size of a micro-batch."""
    lengths = numbers["lengths"]
    keys = ("samples", "tokens", "median", "longest", "trained")
    rows = [[size, f"{100 * share:.1f}%"] for size, share in lengths["padding"].items()]
    sizes = table(keys, [[lengths[key] for key in keys]])
    return sizes + "\n" + table(("samples in a micro-batch", "of it padding"), rows)


def draw(numbers: Numbers, file: Path) -> None:
    """The samples by their length, what is trained of them in colour; and padding by the size of a micro-batch."""
    lengths = numbers["lengths"]
    with drawn(file, (f"{lengths['samples']} samples, tokens", "positions computed, percent")) as (each, share):
        ordered = sorted(lengths["each"], key=lambda pair: pair[1])
        prompts = [n_prompt for n_prompt, _ in ordered]
        answers = [n_tokens - n_prompt for n_prompt, n_tokens in ordered]
        each.bar(range(len(ordered)), prompts, 1.0, color=GREY, label="prompt")
        each.bar(range(len(ordered)), answers, 1.0, bottom=prompts, color=ORANGE, label="answer, trained on")
        each.set(xlabel="sample, shortest first")
        each.legend(frameon=False, loc="upper left")
        sizes, padding = list(lengths["padding"]), [100 * part for part in lengths["padding"].values()]
        trained, ends = lengths["trained"] / lengths["tokens"], [0.0] * len(sizes)
        for name, of_the_rest, colour in (("answer", trained, ORANGE), ("prompt", 1 - trained, GREY)):
            heights = [of_the_rest * (100 - part) for part in padding]
            share.bar(sizes, heights, 0.7, bottom=ends, color=colour, label=name)
            ends = [end + height for end, height in zip(ends, heights, strict=True)]
        share.bar(sizes, padding, 0.7, bottom=ends, color=BLUE, label="padding")
        share.set(xlabel="samples in a micro-batch", ylim=(0, 125), yticks=[0, 25, 50, 75, 100])
        share.legend(frameon=False, loc="upper left", ncols=3)


def measure(options: TokenizerOptions, log: Callable[[str], None]) -> Numbers:
    """Tokenize and count.

    Raises:
        UserError: if the tokenizer cannot be read.
    """
    from experiments.builtin import alpaca_samples, sample_records, tiny_tokenizer
    from llama_ft.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(options.tokenizer) if options.tokenizer else tiny_tokenizer()
    log("texts, lengths, padding")
    return {
        "tokenizer": str(options.tokenizer or "built-in"),
        "quirks": quirks(tokenizer, sample_records("train", N_RECORDS)),
        "lengths": lengths_of(alpaca_samples()),
    }


STUDY = Study("tokenizer", TokenizerOptions, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    sys.exit(main(STUDY))
