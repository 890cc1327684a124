"""Tokenizer, prompts, label masks, files of records, and the batches made of them."""

import io
import json
import math
import re
from pathlib import Path
from statistics import median

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ft.config import PACKAGE_DIR, DataConfig, OnBadRecord, UserError
from llama_ft.data.collate import PAD_ID, Padding, collate, epoch_groups
from llama_ft.data.dataset import SAMPLE_DIR, load_dataset, read_records
from llama_ft.data.prompt import prompt_text
from llama_ft.data.records import Record, Sample
from llama_ft.data.template import ALPACA_TEMPLATE
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.system import Pace
from llama_ft.training import loop

TINY_TOKENIZER = PACKAGE_DIR / "model" / "tiny" / "tokenizer.model"
IGNORED = -100  # the label that PyTorch's cross entropy leaves out
deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=60)
# SentencePiece writes a space as U+2581, so that character alone comes back as a space.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)
instructions = texts.filter(str.strip)


@pytest.fixture(scope="session")
def tiny() -> Tokenizer:
    return Tokenizer(TINY_TOKENIZER)


@pytest.fixture(scope="session")
def llama2(test_data) -> Tokenizer:
    return Tokenizer(test_data / "llama2_tokenizer.model")


@pytest.fixture(scope="session", params=["tiny", "llama2"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens inside a longer text, where SentencePiece must not drop a space before the first."""
    return tokenizer.decode([*tokenizer.encode("a"), *ids])[1:]


# The tokenizer


def test_tokenizer_sizes_and_special_ids(tiny, llama2):
    assert (tiny.vocab_size, tiny.bos_id, tiny.eos_id) == (2048, 1, 2)
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_id) == (32000, 1, 2)
    assert llama2.encode("Hello world", bos=True) == [1, 15043, 3186]


@pytest.mark.parametrize("text", ["A text.", "<s> </s> <unk> <0x0A>"])
def test_bos_and_eos_stand_outside_the_text_which_cannot_spell_them(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.encode(text, bos=True) == [tokenizer.bos_id, *ids]
    assert tokenizer.encode(text, eos=True) == [*ids, tokenizer.eos_id]
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@deterministic
@given(text=texts)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer=.*absent\.model: there is no such file"):
        Tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00\x01\x02", b'{"version": "1.0"}'])
def test_file_that_is_no_tokenizer(tmp_path, content):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer=.*tokenizer\.model is not a SentencePiece model"):
        Tokenizer(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(UserError, match=r"tokenizer\.model is a Git LFS pointer .*: git lfs pull fetches it"):
        Tokenizer(file)


def test_tokenizer_without_eos(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd abe"] * 20),
        model_writer=model,
        vocab_size=12,
        model_type="bpe",
        eos_id=-1,
        minloglevel=2,
    )
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model.getvalue())
    with pytest.raises(UserError, match="no BOS or no EOS"):
        Tokenizer(file)


# Prompts and label masks


def test_prompt_with_input():
    assert prompt_text("Add the numbers.", "2 and 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further context."
        " Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n2 and 3\n\n### Response:"
    )


def test_prompt_without_input():
    assert prompt_text("Name a color.") == (
        "Below is an instruction that describes a task."
        " Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a color.\n\n### Response:"
    )


def test_braces_in_a_record_are_text():
    assert "{input} {0} {" in prompt_text("{input} {0} {", "x")
    assert "{instruction}}" in prompt_text("x", "{instruction}}")


def test_a_known_record_to_the_token(llama2):
    sample = ALPACA_TEMPLATE.sample(Record("Name a color.", "", "Hello world"), llama2)
    # "Hello" without a space before it is 10994 in LLaMA-2's vocabulary; "world" with one is 3186.
    assert sample.tokens[sample.n_prompt :] == [10994, 3186, 2]
    assert llama2.decode(sample.tokens[1 : sample.n_prompt]) == prompt_text("Name a color.")
    assert sample.tokens[0] == 1


def check_partition(tokenizer: Tokenizer, record: Record) -> None:
    """Prompt and answer share out the tokens; nothing of the answer is masked, nothing is trained on twice."""
    prompt = prompt_text(record.instruction, record.input)
    sample = ALPACA_TEMPLATE.sample(record, tokenizer)
    masked, targets = sample.tokens[: sample.n_prompt], sample.tokens[sample.n_prompt :]
    assert masked[0] == tokenizer.bos_id
    assert targets[-1] == tokenizer.eos_id
    assert sample.n_targets == len(targets) == len(sample) - sample.n_prompt
    asked, answer = tokenizer.decode(masked), text_of(tokenizer, targets[:-1])
    assert asked + answer == prompt + record.output
    # Where one piece is both the prompt's colon and the answer's first character, it is trained on; nothing else is.
    prompt_alone = tokenizer.encode(prompt, bos=True)
    split_cleanly = sample.tokens[: len(prompt_alone)] == prompt_alone
    assert answer == (record.output if split_cleanly else f":{record.output}")


@deterministic
@given(instruction=instructions, input=texts, output=texts)
def test_prompt_and_answer_partition_the_tokens(tokenizer, instruction, input, output):
    check_partition(tokenizer, Record(instruction, input, output))


@pytest.mark.parametrize("output", ["- one", "[1, 2]", ":)", "::", "//", "\n", "\n- one", " one", "  ", "", "日本"])
def test_partition_where_prompt_and_answer_may_share_a_piece(tokenizer, output):
    check_partition(tokenizer, Record("Say it.", "", output))


def test_a_piece_across_the_border_is_trained_on(llama2):
    sample = ALPACA_TEMPLATE.sample(Record("List two.", "", "- one\n- two"), llama2)
    assert llama2.decode(sample.tokens[1 : sample.n_prompt]) + ":" == prompt_text("List two.")
    assert text_of(llama2, sample.tokens[sample.n_prompt : -1]) == ":- one\n- two"


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_targets_of_the_built_in_records_are_answer_and_eos(tiny, name):
    records, _ = read_records(SAMPLE_DIR / f"{name}.jsonl", OnBadRecord.error)
    for record in records:
        check_partition(tiny, record)


# The real records


def test_real_records(llama2, test_data):
    file = test_data / "alpaca_data_200.json"
    records, n_skipped = read_records(file, OnBadRecord.error)
    dataset = load_dataset(DataConfig(name="alpaca_200", path=str(file), first=200), llama2, 4096, None)
    lengths = [len(sample) for sample in dataset.samples]
    assert (len(records), n_skipped, sum(record.input != "" for record in records)) == (200, 0, 118)
    assert (len(lengths), sum(lengths), median(lengths), max(lengths)) == (200, 24_200, 96, 405)
    assert (dataset.n_skipped, dataset.n_truncated, dataset.n_dropped) == (0, 0, 0)
    assert "200 samples, 24,200 tokens (median 96, longest 405)" in dataset.describe()


def test_real_answers_are_the_targets(llama2, test_data):
    source = json.loads((test_data / "alpaca_data_200.json").read_text(encoding="utf-8"))
    records, _ = read_records(test_data / "alpaca_data_200.json", OnBadRecord.error)
    n_exact = 0
    for given_record, record in zip(source, records, strict=True):
        assert given_record == {"instruction": record.instruction, "input": record.input, "output": record.output}
        check_partition(llama2, record)
        sample = ALPACA_TEMPLATE.sample(record, llama2)
        n_exact += text_of(llama2, sample.tokens[sample.n_prompt : -1]) == record.output
    assert n_exact >= 190


# Files


def write(file: Path, content: object) -> Path:
    """Bytes and text as they are, anything else as JSON."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    file.write_bytes(content)
    return file


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for all the examples of a property test."""
    return tmp_path_factory.mktemp("records")


GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "records.json"


def read(file: Path, on_bad_record: OnBadRecord = OnBadRecord.error) -> list[Record]:
    return read_records(file, on_bad_record)[0]


@deterministic
@given(rows=st.lists(st.tuples(instructions, texts, texts), min_size=1, max_size=4), escaped=st.booleans())
def test_json_and_jsonl_are_read_alike(shared_folder, rows, escaped):
    values = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]
    array = write(shared_folder / "array", json.dumps(values, ensure_ascii=escaped, indent=1))
    lines = write(shared_folder / "lines", "\n".join(json.dumps(value, ensure_ascii=escaped) for value in values))
    assert read(array) == read(lines) == [Record(*row) for row in rows]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_jsonl_lines_end_at_line_feeds_alone(file, separator):
    record = GOOD | {"output": f"one{separator}two"}
    write(file, json.dumps(record, ensure_ascii=False) + "\n")
    assert read(file) == [Record("Say hello.", "", f"one{separator}two")]


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_mark_blank_lines_and_line_ends(file, jsonl, newline):
    text = newline.join(json.dumps(GOOD) for _ in range(2)) if jsonl else json.dumps([GOOD, GOOD], indent=1)
    write(file, b"\xef\xbb\xbf" + f"{newline}{text}{newline}{newline}".replace("\n", newline).encode())
    assert read(file) == [Record("Say hello.", "", "Hello.")] * 2


def test_files_with_byte_order_marks_can_be_joined(file):
    line = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n"
    assert read(write(file, line * 2)) == [Record("Say hello.", "", "Hello.")] * 2


@pytest.mark.parametrize(
    "record", [{}, {"input": ""}, {"input": None}, {"input": math.nan, "task": math.nan}], ids=repr
)
def test_no_input_is_an_empty_one(file, record):
    write(file, [{"instruction": "Say hello.", "output": "Hello."} | record])
    assert read(file) == [Record("Say hello.", "", "Hello.")]


def test_a_task_is_kept_and_other_keys_are_let_be(file):
    assert read(write(file, [GOOD | {"task": "greet", "id": 7}])) == [Record("Say hello.", "", "Hello.", "greet")]


def test_one_object_alone_is_a_record(file):
    for indent in (None, 2):
        assert read(write(file, json.dumps(GOOD, indent=indent))) == [Record("Say hello.", "", "Hello.")]


BAD_RECORDS = {
    "no instruction": ({"output": "x"}, "instruction is missing"),
    "no output": ({"instruction": "x"}, "output is missing"),
    "empty instruction": (GOOD | {"instruction": " \n"}, "instruction is empty"),
    "instruction null": (GOOD | {"instruction": None}, "instruction is null or NaN"),
    "output NaN": (GOOD | {"output": math.nan}, "output is null or NaN"),
    "input infinite": (GOOD | {"input": math.inf}, "input must be a text"),
    "output a number": (GOOD | {"output": 5}, "output must be a text"),
    "input zero": (GOOD | {"input": 0}, "input must be a text"),
    "a text": ("Say hello.", "must be an object .* not str"),
    "a list": ([GOOD], "must be an object .* not list"),
    "null": (None, "must be an object"),
    "half a character": (GOOD | {"output": "\ud83d"}, "output is not text"),
}


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize(("bad", "problem"), BAD_RECORDS.values(), ids=list(BAD_RECORDS))
def test_bad_record(file, jsonl, bad, problem):
    values = [GOOD, GOOD, bad, GOOD]
    write(file, "\n\n".join(map(json.dumps, values)) if jsonl else values)
    place = r"record 2 \(line 5\)" if jsonl else "record 2"
    message = rf"records\.json, {place}: .*{problem}.*\. data\.on_bad_record=skip leaves such"
    with pytest.raises(UserError, match=message):
        read(file)
    assert read_records(file, OnBadRecord.skip) == ([Record("Say hello.", "", "Hello.")] * 3, 1)


def test_broken_line_in_jsonl(file):
    write(file, f'{json.dumps(GOOD)}\n{{"instruction": \n{json.dumps(GOOD)}\n')
    with pytest.raises(UserError, match=r"records\.json, record 1 \(line 2\): not valid JSON"):
        read(file)
    assert read_records(file, OnBadRecord.skip)[1] == 1


@pytest.mark.parametrize("policy", list(OnBadRecord))
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (json.dumps([GOOD, GOOD])[:-5], "is not valid JSON.*line 1 column"),
        ({"data": [GOOD]}, "is one JSON object: it must be an array of records"),
        (json.dumps({"version": 1, "records": [GOOD]}, indent=2), "is one JSON object"),
        (json.dumps([GOOD]).encode("utf-16"), "cannot be read: line 1 is not UTF-8 text; save it as UTF-8"),
        (b'\xef\xbb\xbf[\r\n{"output": "\xe9"}]', "cannot be read: line 2 is not UTF-8 text"),
        ("[" * 100_000, "is not valid JSON: .*recursion"),
    ],
)
def test_files_that_are_no_records(file, content, problem, policy):
    with pytest.raises(UserError, match=rf"records\.json {problem}"):
        read(write(file, content), policy)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "there are no records"),
        ("\n \n", "there are no records"),
        ("[]", "there are no records"),
        ("[{}, {}]", "all 2 records are bad, the first is record 0: instruction is missing"),
        ("instruction,output\na,b", r"all 2 records are bad, the first is record 0 \(line 1\): not valid JSON"),
    ],
    ids=["empty", "blank", "empty array", "all bad", "a spreadsheet"],
)
def test_file_without_records(file, tiny, content, problem):
    write(file, content)
    with pytest.raises(UserError, match=rf"records\.json: {problem}"):
        load_dataset(DataConfig("mine", str(file), on_bad_record=OnBadRecord.skip), tiny, 1024, None)


def test_missing_file_and_folder(tmp_path):
    for path, reason in ((tmp_path / "absent.json", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=rf"{re.escape(str(path))} cannot be read: .*{reason}"):
            read(path)


@pytest.mark.parametrize(
    ("first", "max_samples", "expected"), [(None, None, 6), (4, None, 4), (None, 3, 3), (4, 3, 3), (3, 4, 3), (9, 9, 6)]
)
def test_first_records_and_samples(file, tiny, first, max_samples, expected):
    values = [GOOD | {"output": str(index)} for index in range(6)]
    config = DataConfig("mine", str(write(file, values)), first=first)
    samples = load_dataset(config, tiny, 1024, max_samples).samples
    answers = [text_of(tiny, sample.tokens[sample.n_prompt : -1]) for sample in samples]
    assert answers == [str(index) for index in range(expected)]


def test_a_long_tokenization_says_how_far_it_is(file, tiny, monkeypatch):
    monkeypatch.setattr(Pace, "SECONDS", 0)
    lines = []
    load_dataset(DataConfig("mine", str(write(file, [GOOD] * 3))), tiny, 1024, 2, lines.append)
    assert lines == ["data: 1 records tokenized", "data: 2 records tokenized"]


# Truncation


@pytest.mark.parametrize("max_length", [2, 40, 45, 50, 60, 1024])
def test_truncation_is_counted(file, tiny, max_length):
    values = [GOOD | {"instruction": "word " * count, "output": "word " * (9 - count)} for count in range(1, 9)]
    records = read(write(file, values))
    whole = [ALPACA_TEMPLATE.sample(record, tiny) for record in records]
    kept = [sample for sample in whole if sample.n_prompt < max_length]
    config = DataConfig("mine", str(file))
    if not kept:
        with pytest.raises(UserError, match=f"max_length={max_length} leaves no answer"):
            load_dataset(config, tiny, max_length, None)
        return
    dataset = load_dataset(config, tiny, max_length, None)
    assert [list(sample.tokens) for sample in dataset.samples] == [sample.tokens[:max_length] for sample in kept]
    assert dataset.n_truncated == sum(len(sample.tokens) > max_length for sample in kept)
    assert dataset.n_dropped == len(whole) - len(kept)
    assert all(0 < sample.n_targets <= max_length for sample in dataset.samples)


def test_what_became_of_the_records_is_said(file, tiny):
    values = [GOOD, GOOD | {"output": "word " * 300}, {}, GOOD | {"instruction": "word " * 300}, {"instruction": "x"}]
    config = DataConfig("mine", str(write(file, values)), on_bad_record=OnBadRecord.skip)
    dataset = load_dataset(config, tiny, 200, None)
    assert (len(dataset.samples), dataset.n_skipped, dataset.n_truncated, dataset.n_dropped) == (2, 2, 1, 1)
    assert dataset.describe().startswith("2 samples, ")
    assert dataset.describe().endswith("; 2 bad records skipped; 1 truncated; 1 dropped")


# Batches


@st.composite
def made_up_samples(draw: st.DrawFn) -> list[Sample]:
    tokens = draw(st.lists(st.lists(st.integers(1, 99), min_size=2, max_size=12), min_size=1, max_size=5))
    return [Sample.after(row, draw(st.integers(1, len(row) - 1))) for row in tokens]


def naive_targets(samples: list[Sample], width: int) -> list[tuple[int, int]]:
    """(flat position, target) as usually computed: a label a token, prompt and padding ignored, shifted by one."""
    found = []
    for row, sample in enumerate(samples):
        padded = sample.tokens + [PAD_ID] * (width + 1 - len(sample.tokens))
        labels = [IGNORED] * sample.n_prompt + sample.tokens[sample.n_prompt :]
        labels += [IGNORED] * (len(padded) - len(labels))
        shifted = labels[1:]
        found += [(row * width + column, label) for column, label in enumerate(shifted) if label != IGNORED]
    return found


@deterministic
@given(samples=made_up_samples(), pad_multiple=st.integers(1, 8))
def test_batch_is_what_naive_padding_and_shifting_give(samples, pad_multiple):
    batch = collate(samples, Padding(pad_multiple))
    longest = max(len(sample) for sample in samples) - 1
    rows, width = batch.tokens.shape
    assert rows == len(samples)
    assert width % pad_multiple == 0
    assert longest <= width < longest + pad_multiple
    for row, sample in zip(batch.tokens.tolist(), samples, strict=True):
        assert row == sample.tokens[:-1] + [PAD_ID] * (width - len(sample) + 1)
    targets = list(zip(batch.target_positions.tolist(), batch.targets.tolist(), strict=True))
    assert targets == naive_targets(samples, width)
    assert batch.n_targets == len(targets) == sum(sample.n_targets for sample in samples)
    assert batch.n_tokens == sum(len(sample) for sample in samples)


def test_loss_at_the_positions_is_the_loss_with_ignored_labels():
    samples = [Sample.after([1, 5, 6, 7, 2], 3), Sample.after([1, 8, 2], 1), Sample.after([1, 9, 9, 2], 2)]
    batch = collate(samples)
    rows, width = batch.tokens.shape
    logits = torch.randn(rows, width, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.full((rows * width,), IGNORED)
    for position, target in naive_targets(samples, width):
        labels[position] = target
    there = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch.target_positions], batch.targets)
    everywhere = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED)
    torch.testing.assert_close(there, everywhere, rtol=1e-12, atol=0)


def numbered_samples(count: int) -> list[Sample]:
    return [Sample.after([1, 100 + index, *[7] * (index % 5), 2], 1) for index in range(count)]


def flat(groups: list[list[int]]) -> list[int]:
    return [index for group in groups for index in group]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 20, 50])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_sample_once_an_epoch(micro_batch_size, epoch):
    groups = epoch_groups(20, micro_batch_size, epoch, seed=3)
    assert sorted(flat(groups)) == list(range(20))
    sizes = [len(group) for group in groups]
    assert sizes[:-1] == [micro_batch_size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= micro_batch_size


def test_order_is_the_one_that_runs_of_earlier_versions_had():
    assert epoch_groups(7, 3, epoch=0, seed=0) == [[4, 0, 5], [3, 2, 6], [1]]
    assert epoch_groups(7, 3, epoch=1, seed=5) == [[3, 1, 5], [6, 2, 0], [4]]


def test_order_depends_on_seed_and_epoch_alone():
    before = torch.random.get_rng_state()
    orders = {(epoch, seed): epoch_groups(20, 1, epoch, seed) for epoch in range(3) for seed in range(3)}
    assert len(set(map(str, orders.values()))) == 9  # no seed's later epoch is another seed's first
    torch.manual_seed(99)
    assert flat(epoch_groups(20, 4, epoch=0, seed=2)) == flat(orders[0, 2])
    torch.random.set_rng_state(before)
    assert epoch_groups(20, 1, epoch=0, seed=2) == orders[0, 2]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("first", [0, 1, 6, 7, 9])
def test_windows_are_the_groups_collated_one_window_at_a_time(monkeypatch, first):
    samples, collated = numbered_samples(20), []
    monkeypatch.setattr(loop, "collate", lambda group, padding: collated.append(group) or collate(group, padding))
    groups = [[samples[index] for index in group] for group in epoch_groups(20, 3, 1, 4)][first:]
    epoch = loop.Windows(samples, 3, 1, 4, Padding(8)).epoch(1, first)
    for n_done, group in enumerate(groups, start=1):
        (batch,), expected = next(epoch), collate(group, Padding(8))
        assert all(map(torch.equal, batch.tensors, expected.tensors))
        assert collated == groups[:n_done]
    assert list(epoch) == []


# The built-in records


def test_sample_is_the_training_part(tiny):
    built_in = load_dataset(DataConfig("sample"), tiny, 1024, 5)
    by_path = load_dataset(DataConfig("sample", str(SAMPLE_DIR / "train.jsonl")), tiny, 1024, 5)
    assert built_in == by_path


def test_padding_to_a_multiple_ends_at_the_context():
    sample = Sample.after([1] * 101, 1)
    assert collate([sample], Padding(32, max_width=1024)).tokens.shape == (1, 128)
    assert collate([sample], Padding(32, max_width=108)).tokens.shape == (1, 108)
    assert collate([sample], Padding(32, max_width=100)).tokens.shape == (1, 100)
