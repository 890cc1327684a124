"""Writes the built-in data set and tiny's tokenizer, reproducibly: `python -m dev.sample`."""

import argparse
import io
import json
import string
from collections.abc import Iterator
from pathlib import Path
from random import Random

import sentencepiece

from dev import number_tasks, text_tasks, word_tasks
from dev.corpus import sentences
from dev.prose import PARAGRAPHS
from dev.task import Record
from llama_ft.config import PACKAGE_DIR
from llama_ft.data.dataset import SAMPLE_DIR
from llama_ft.data.prompt import prompt_text

SEED = 2023
VOCAB_SIZE = 2048
TASKS = [*word_tasks.TASKS, *number_tasks.TASKS, *text_tasks.TASKS]
# Printable ASCII, and the few other characters in English texts, are pieces; the rest is spelled in bytes.
_CHARACTERS = string.digits + string.ascii_letters + string.punctuation + "‘’“”–—…°éèñü£€"


def make_records() -> tuple[list[Record], list[Record]]:
    """All records: (training, held-out), the tasks mixed."""
    train: list[Record] = []
    heldout: list[Record] = []
    for task in TASKS:
        # One generator per task, so that changing a task does not change the others' records.
        task_train, task_heldout = task.split(Random(f"{SEED} {task.name}"))
        train += task_train
        heldout += task_heldout
    rng = Random(SEED)
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def tokenizer_text(train: list[Record]) -> Iterator[str]:
    """The tokenizer's training text: the training records as the model will see them, and general English."""
    for record in train:
        yield prompt_text(record["instruction"], record["input"]) + record["output"]
    yield from sentences(Random(SEED), 20_000)
    for _ in range(20):  # makes real prose a seventh of the text
        yield from PARAGRAPHS


def train_tokenizer(texts: Iterator[str]) -> bytes:
    """A SentencePiece model with LLaMA-2's settings and a smaller vocabulary."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Line breaks are replaced by a digit, because no piece may cross a digit (split_digits). So words at the start
        # of a line are counted without a space before them, and the line break itself stays a byte piece, as in LLaMA.
        # Otherwise it would be merged into pieces such as ".\n\n###".
        sentence_iterator=(text.replace("\n", "0") for text in texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        character_coverage=1.0,
        required_chars=_CHARACTERS,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # more threads may break ties differently
        max_sentence_length=8192,
        minloglevel=2,
    )
    return model.getvalue()


def _write_jsonl(file: Path, records: list[Record]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    file.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="Write the built-in data set and tiny's tokenizer.")
    parser.add_argument("--out", type=Path, help="write all three files into this folder instead of the package")
    out: Path | None = parser.parse_args().out
    data, tiny = out or SAMPLE_DIR, out or PACKAGE_DIR / "model" / "tiny"
    data.mkdir(parents=True, exist_ok=True)
    train, heldout = make_records()
    _write_jsonl(data / "train.jsonl", train)
    _write_jsonl(data / "heldout.jsonl", heldout)
    (tiny / "tokenizer.model").write_bytes(train_tokenizer(tokenizer_text(train)))


if __name__ == "__main__":
    main()
