"""What there is to know of records before they are trained on."""

from array import array
from collections.abc import Sequence
from itertools import groupby, pairwise
from math import ceil
from statistics import mean, median

from llama_ft.config import DataCommandConfig, OnLong
from llama_ft.data.dataset import Log, Reader, records_file
from llama_ft.data.records import Record, Sample
from llama_ft.data.template import choose_template
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.records.data import Bin, DataReport, Example, Lengths, Places, Segment

MAX_NAMED = 5  # records that are named by their places
MAX_BINS = 12
STEPS = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]  # widths of a bin


class _Found:
    """What was found so far."""

    def __init__(self) -> None:
        self.wholes, self.places = list[Sample](), list[str]()  # however long
        self.tokens = self.trained_tokens = 0  # of what is left of them
        self.empty, self.too_long = list[str](), list[str]()
        self.n_duplicates, self.first_pair = 0, list[str]()
        self._seen: dict[int, str] = {}

    def add(self, where: str, record: Record, whole: Sample) -> None:
        """A record, and its sample."""
        self.wholes.append(Sample(array("i", whole.tokens), whole.spans))  # a tenth of a list
        self.places.append(where)
        if (earlier := self._seen.setdefault(hash(str(record.messages)), where)) != where:
            self.n_duplicates += 1
            self.first_pair = self.first_pair or [earlier, where]
        said = (message["content"] for message in record.messages if message["role"] == "assistant")
        if not all(text.strip() for text in said):
            self.empty.append(where)


def inspect_data(config: DataCommandConfig, tokenizer: Tokenizer, command: str, log: Log) -> DataReport:
    """Read and tokenize all records; a UserError if one is bad, or there is none. Too long ones stop nothing."""
    data, template, found = config.data, choose_template(config.data.template, tokenizer), _Found()
    reader = Reader(records_file(data, log), data, log)
    for where, record, whole in reader.whole_samples(template, tokenizer):
        found.add(where, record, whole)
        if len(whole) > config.max_length:
            found.too_long.append(where)
            if data.on_long is OnLong.error:
                continue
        if (sample := reader.fitted(where, whole, config.max_length)) is not None:
            found.tokens += len(sample)
            found.trained_tokens += sample.n_targets
    reader.check_records()
    lengths = sorted(map(len, found.wholes))
    names = {number: name for name, number in tokenizer.special.items()}
    return DataReport(
        data=data.title,
        file=str(reader.path),
        tokenizer=str(tokenizer.file),
        template=template.name,
        ends=[names.get(number, str(number)) for number in sorted(tokenizer.end_ids)],
        max_length=config.max_length,
        records=reader.n_records,
        skipped=reader.n_skipped,
        lengths=_statistics(lengths),
        histogram=histogram(lengths),
        too_long=_places(found.too_long),
        truncated=reader.n_truncated,
        dropped=reader.n_dropped,
        tokens=found.tokens,
        trained_tokens=found.trained_tokens,
        duplicates=Places(found.n_duplicates, found.first_pair),
        empty_answers=_places(found.empty),
        examples=_examples(found, tokenizer),
        settings=config.to_dict(),
        command=command,
    )


def _examples(found: _Found, tokenizer: Tokenizer) -> list[Example]:
    by_length = sorted(range(len(found.wholes)), key=lambda index: len(found.wholes[index]))
    shown = {"First": 0, "Of median length": by_length[(len(by_length) - 1) // 2], "Longest": by_length[-1]}
    return [
        Example(name, found.places[index], len(found.wholes[index]), segments(found.wholes[index], tokenizer))
        for name, index in shown.items()
    ]


def _places(found: list[str]) -> Places:
    return Places(len(found), found[:MAX_NAMED])


def _share(lengths: Sequence[int], share: float) -> int:
    """The length that so large a share of the sorted ones does not exceed."""
    return lengths[ceil(share * len(lengths)) - 1]


def _statistics(lengths: Sequence[int]) -> Lengths:
    p90, p99 = _share(lengths, 0.9), _share(lengths, 0.99)
    return Lengths(lengths[0], median(lengths), mean(lengths), p90, p99, lengths[-1])


def histogram(lengths: Sequence[int]) -> list[Bin]:
    """Bins of one width from the shortest to the 99th percentile; the last takes what is longer too."""
    low, high = lengths[0], _share(lengths, 0.99)
    width = next(step for step in STEPS if high // step - low // step < MAX_BINS)
    starts = range(low // width * width, high + 1, width)
    ends = [*(start + width - 1 for start in starts[:-1]), lengths[-1]]
    counts = [sum(first <= length <= last for length in lengths) for first, last in zip(starts, ends, strict=True)]
    lasts = [*ends[:-1], ends[-1] if lengths[-1] < starts[-1] + width else None]
    return [Bin(*bin) for bin in zip(starts, lasts, counts, strict=True)]


def segments(sample: Sample, tokenizer: Tokenizer) -> list[Segment]:
    """A sample's text in its parts: trained on, or only read."""
    edges = sorted({0, len(sample), *(edge for span in sample.spans for edge in span)})
    # A character may begin before an edge and end after it: it is the latter part's.
    ends = [len(_spelled(sample.tokens[:edge], tokenizer).rstrip("\ufffd")) for edge in edges[:-1]]
    text = _spelled(sample.tokens, tokenizer)
    parts = zip(pairwise([*ends, len(text)]), pairwise(edges), strict=True)
    return [Segment(text[first:end], span in sample.spans) for (first, end), span in parts]


def _spelled(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of tokens, special ones by their names."""
    names = {number: name for name, number in tokenizer.special.items()}
    return "".join(
        "".join(names[token] for token in run) if is_special else tokenizer.decode(list(run))
        for is_special, run in groupby(tokens, key=names.__contains__)
    )
