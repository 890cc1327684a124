"""Statistics of records before they are trained on."""

from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from math import ceil
from statistics import mean, median

from llama_ft.config import DataCommandConfig
from llama_ft.config.checks import OnLong
from llama_ft.data.dataset import Reader, records_file
from llama_ft.data.records import Sample
from llama_ft.data.template import choose_template
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.records.data import DataReport, Example, Places
from llama_ft.system import Log

MAX_NAMED = 5  # records that are named by place
MAX_BARS = 12
WIDTHS = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]  # of a bar, in tokens


def inspect_data(config: DataCommandConfig, tokenizer: Tokenizer, command: str, log: Log) -> DataReport:
    """Read and tokenize all records; a UserError if one is bad, or there is none, but not if one is too long."""
    template = choose_template(config.data.template, tokenizer)
    reader = Reader(records_file(config.data, log), config.data, log)
    wholes, seen, same = list[tuple[str, Sample]](), dict[int, str](), list[str]()
    empty, too_long, n_tokens, n_trained = list[str](), list[str](), 0, 0
    for where, record, whole in reader.whole_samples(template, tokenizer):
        wholes.append((where, Sample(array("i", whole.tokens), whole.spans)))  # a tenth of a list's memory
        if (earlier := seen.setdefault(record.identity, where)) != where:
            same += [where] if same else [earlier, where]
        empty += [where] * any(said["role"] == "assistant" and not said["content"].strip() for said in record.messages)
        too_long += [where] * (is_long := len(whole) > config.max_length)
        if is_long and config.data.on_long is OnLong.error:
            continue
        if (sample := reader.fitted(where, whole, config.max_length)) is not None:
            n_tokens, n_trained = n_tokens + len(sample), n_trained + sample.n_targets
    names = {number: name for name, number in tokenizer.special.items()}
    lengths = sorted(len(sample) for _, sample in wholes)
    return DataReport(
        data=config.data.title,
        tokenizer=str(tokenizer.file),
        template=template.name,
        ends=[names.get(number, str(number)) for number in sorted(tokenizer.end_ids)],
        max_length=config.max_length,
        records=reader.n_records,
        skipped=reader.n_skipped,
        lengths=_statistics(lengths),
        histogram=histogram(lengths),
        too_long=Places(len(too_long), too_long[:MAX_NAMED]),
        truncated=reader.n_truncated,
        dropped=reader.n_dropped,
        tokens=n_tokens,
        trained_tokens=n_trained,
        duplicates=Places(max(0, len(same) - 1), same[:2]),
        empty_answers=Places(len(empty), empty[:MAX_NAMED]),
        examples=_examples(wholes, tokenizer),
        settings=config.to_dict(),
        command=command,
    )


def _examples(wholes: list[tuple[str, Sample]], tokenizer: Tokenizer) -> list[Example]:
    by_length = sorted(wholes, key=lambda whole: len(whole[1]))
    shown = {"First": wholes[0], "Of median length": by_length[(len(wholes) - 1) // 2], "Longest": by_length[-1]}
    return [Example(name, where, len(sample), parts(sample, tokenizer)) for name, (where, sample) in shown.items()]


def _share(lengths: Sequence[int], share: float) -> int:
    """The length that this share of the sorted lengths does not exceed."""
    return lengths[ceil(share * len(lengths)) - 1]


def _statistics(lengths: Sequence[int]) -> dict[str, float]:
    shares = {"p90": _share(lengths, 0.9), "p99": _share(lengths, 0.99)}
    middle = {"median": median(lengths), "mean": mean(lengths)}
    return {"shortest": lengths[0], **middle, **shares, "longest": lengths[-1]}


def histogram(lengths: Sequence[int]) -> dict[str, int]:
    """Count the sorted lengths in bars of equal width; the last bar has all beyond the 99th percentile."""
    high = _share(lengths, 0.99)
    width = next(width for width in WIDTHS if high // width - lengths[0] // width < MAX_BARS)
    counts = Counter(min(length, high) // width for length in lengths)
    last = "or more" if lengths[-1] // width > high // width else f"– {high // width * width + width - 1:,}"
    bars = range(lengths[0] // width, high // width)
    names = [f"{bar * width:,} – {bar * width + width - 1:,}" for bar in bars] + [f"{high // width * width:,} {last}"]
    return {name: counts[bar] for bar, name in enumerate(names, lengths[0] // width)}


def parts(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """A sample's text in parts, each with True if it is trained on."""
    edges = sorted({0, len(sample), *(edge for span in sample.spans for edge in span)})
    # A character that spans an edge belongs to the part after it.
    ends = [len(_spelled(sample.tokens[:edge], tokenizer).rstrip("\ufffd")) for edge in edges[:-1]]
    text = _spelled(sample.tokens, tokenizer)
    cuts = zip(pairwise([*ends, len(text)]), pairwise(edges), strict=True)
    return [(text[first:end], span in sample.spans) for (first, end), span in cuts]


def _spelled(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of tokens, with special ones by name."""
    names = {number: name for name, number in tokenizer.special.items()}
    return "".join(
        "".join(names[token] for token in run) if is_special else tokenizer.decode(list(run))
        for is_special, run in groupby(tokens, key=names.__contains__)
    )
